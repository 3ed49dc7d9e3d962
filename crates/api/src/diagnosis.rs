//! Looking into an instance from outside: core dumps and captures of packets. What a filter is to the kernel lives elsewhere.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Query of `POST …/capture`: which packets, and when it ends. Nothing given: all of them, until the caller has enough. A name
/// that is not known is refused: it might have been meant to leave something out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct CaptureRequest {
    /// One interface of the instance; all of them when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Range>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dest: Option<Range>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dest_port: Option<u16>,
    /// Source or destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Range>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// It ends after so many seconds, packets, or bytes of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Bytes kept of each packet; all of them when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snap_length: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    /// Of both versions of IP.
    #[serde(alias = "icmpv4")]
    Icmp,
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "icmp" | "icmpv4" => Ok(Self::Icmp),
            _ => Err(format!("protocol \"{text}\" is none of tcp, udp and icmp")),
        }
    }
}

/// An address, or all that begin with the same bits: `192.0.2.1`, `192.0.2.0/24`, `2001:db8::/32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Range {
    pub address: IpAddr,
    /// How many bits count.
    pub prefix: u8,
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is neither an address nor a range such as 10.0.0.0/8");
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(whole), str::parse).map_err(|_| wrong())?;
        if prefix <= whole { Ok(Self { address, prefix }) } else { Err(wrong()) }
    }
}

impl TryFrom<String> for Range {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl From<Range> for String {
    fn from(range: Range) -> Self {
        range.to_string()
    }
}

/// What happens to the core of a process of the instance that crashes. Body of `PUT …/cores`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct CoreSettings {
    /// Without it the core is thrown away.
    pub enabled: bool,
    /// A path inside the container, with the specifiers of core(5); what is relative is so to the process's working directory.
    /// Where none is given the core is kept beside the instance and can be fetched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
}

/// Answer of `GET …/cores` and `PUT …/cores`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cores {
    pub settings: CoreSettings,
    /// Those that are kept, the newest first.
    pub dumps: Vec<CoreDump>,
}

/// A core that is kept: `GET …/cores/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CoreDump {
    /// `CONTAINER.PROGRAM.PID.SIGNAL.TIME.core`; it ends in `.cut` where not all of it is there.
    pub name: String,
    pub bytes: u64,
    pub at: Timestamp,
}

impl Cores {
    /// Without what no agent says that is in its right mind: names and patterns are for files and terminals.
    pub fn plausible(mut self) -> Self {
        self.settings.pattern = self.settings.pattern.filter(|pattern| check_core_pattern(pattern).is_ok());
        self.dumps.retain(|dump| is_core_name(&dump.name));
        self.dumps.truncate(MOST_CORES);
        self
    }
}

/// So many cores are never kept.
const MOST_CORES: usize = 64;

fn is_core_name(name: &str) -> bool {
    let whole = name.strip_suffix(".cut").unwrap_or(name);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_+.".contains(&byte);
    whole.ends_with(".core") && !name.starts_with('.') && name.len() <= 255 && name.bytes().all(plain)
}

/// A crash, as the kernel's handler tells the agent: query of its `POST /v1/cores`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Crash {
    pub container: String,
    pub program: String,
    /// As the container sees it.
    pub pid: u32,
    pub signal: String,
    /// The name it is kept by, or the path inside the container.
    pub place: String,
    pub kept: bool,
}

/// How the writing went: body of the same call, when it is done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CoreWritten {
    pub bytes: u64,
    /// There was more than may be written.
    pub cut: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Longest pattern, as in the kernel.
const LONGEST_PATTERN: usize = 127;

/// Why a text is no pattern for cores.
pub fn check_core_pattern(pattern: &str) -> Result<(), String> {
    let why = match pattern {
        "" => "it is empty",
        _ if pattern.starts_with(['|', '@']) => "it must be a path; programs and sockets are the host's",
        _ if pattern.ends_with('/') => "it must name a file",
        _ if pattern.len() > LONGEST_PATTERN => "it is longer than 127 bytes",
        _ if pattern.contains(|c: char| c.is_control()) => "it has control characters",
        _ => return Ok(()),
    };
    Err(format!("core pattern \"{pattern}\": {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_patterns() {
        for (text, wanted) in [("10.1.2.3", "10.1.2.3/32"), ("10.0.0.0/8", "10.0.0.0/8"), ("::1", "::1/128")] {
            assert_eq!(text.parse::<Range>().map(|range| range.to_string()).as_deref(), Ok(wanted));
        }
        for wrong in ["", "10.0.0", "10.0.0.0/33", "::/129", "a/8", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/8/8"] {
            assert!(wrong.parse::<Range>().is_err(), "{wrong}");
        }
        for good in ["/data/core", "core-%e", "/a b/%%"] {
            assert_eq!(check_core_pattern(good), Ok(()));
        }
        for wrong in ["", "|/bin/sh", "@/sock", "/data/", "a\nb", &"x".repeat(128)] {
            assert!(check_core_pattern(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_an_agent_tells_of_cores_is_fit_to_be_shown() {
        let dump = |name: &str| CoreDump { name: name.to_owned(), bytes: 1, at: Timestamp::UNIX_EPOCH };
        let good = ["web.sh.7.SIGSEGV.0.core", "web.a_b+c-d.7.signal40.0.core.cut"];
        let bad = ["", ".core", "../core.core", "a\u{1b}[2J.core", "web.core.exe", "ä.core", &"x".repeat(300)];
        let dumps = good.iter().chain(&bad).map(|name| dump(name)).collect();
        let settings = CoreSettings { enabled: true, pattern: Some("/a\nb".to_owned()) };
        let told = Cores { settings, dumps }.plausible();
        assert_eq!(told.dumps.iter().map(|dump| dump.name.as_str()).collect::<Vec<_>>(), good);
        assert_eq!(told.settings.pattern, None);
        let many = Cores { dumps: vec![dump(good[0]); 10_000], ..Cores::default() };
        assert_eq!(many.plausible().dumps.len(), MOST_CORES);
    }
}
