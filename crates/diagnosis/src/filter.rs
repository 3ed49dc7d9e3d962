//! Which packets a capture wants, as a program of classic BPF over Ethernet frames, run by the kernel before it copies anything.
//!
//! As in tcpdump, a filter on an address or a port is one on IP: other frames do not pass. Ports are found in the first fragment of
//! a packet only, and in IPv6 only where no further header is before them.

use std::net::IpAddr;

use joey_api::diagnosis::{CaptureRequest, Protocol, Range};

/// Numbers of protocols (IANA).
const TCP: u32 = 6;
const UDP: u32 = 17;
/// linux/bpf_common.h: load into A so many bytes of a place, what makes it X and a place, load X with a header's length, and, jump,
/// return.
const LOAD: [(u16, u16); 3] = [(1, 0x30), (2, 0x28), (4, 0x20)];
const INDEXED: u16 = 0x60;
const LOAD_LENGTH: u16 = 0xb1;
const AND: u16 = 0x54;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// A condition on a frame.
enum Test {
    All(Vec<Test>),
    Any(Vec<Test>),
    Is(Field, u32),
}

/// Some bytes of a frame as a number, and the bits of it that count.
#[derive(Clone, Copy)]
struct Field {
    at: u32,
    size: u16,
    mask: u32,
    /// `at` counts from the end of the IPv4 header, less the Ethernet header.
    after_header: bool,
}

fn field(at: u32, size: u16) -> Field {
    Field { at, size, mask: u32::MAX, after_header: false }
}

/// Where the jump goes, before it is known how far that is.
type Label = usize;

/// Code, value, and the labels for true and false.
type Line = (u16, u32, Option<(Label, Label)>);

#[derive(Default)]
struct Assembler {
    program: Vec<Line>,
    labels: Vec<usize>,
}

impl Assembler {
    fn label(&mut self) -> Label {
        self.labels.push(usize::MAX);
        self.labels.len() - 1
    }

    fn place(&mut self, label: Label) {
        self.labels[label] = self.program.len();
    }

    fn plain(&mut self, code: u16, value: u32) {
        self.program.push((code, value, None));
    }

    fn test(&mut self, test: &Test, yes: Label, no: Label) {
        match test {
            Test::All(tests) | Test::Any(tests) => {
                for (at, one) in tests.iter().enumerate() {
                    if at + 1 == tests.len() {
                        return self.test(one, yes, no);
                    }
                    let next = self.label();
                    match test {
                        Test::All(_) => self.test(one, next, no),
                        _ => self.test(one, yes, next),
                    }
                    self.place(next);
                }
            }
            Test::Is(field, value) => {
                let load = LOAD.iter().find(|(size, _)| *size == field.size).map_or(0x20, |(_, code)| *code);
                if field.after_header {
                    self.plain(LOAD_LENGTH, 14);
                    self.plain(load ^ INDEXED, field.at);
                } else {
                    self.plain(load, field.at);
                }
                if field.mask != u32::MAX {
                    self.plain(AND, field.mask);
                }
                self.program.push((JUMP_EQUAL, *value, Some((yes, no))));
            }
        }
    }

    fn finish(self) -> Vec<libc::sock_filter> {
        let distance = |label: Label, from: usize| (self.labels[label] - from - 1) as u8;
        let all = self.program.iter().enumerate().map(|(at, (code, k, jump))| {
            let (jt, jf) = jump.map_or((0, 0), |(yes, no)| (distance(yes, at), distance(no, at)));
            libc::sock_filter { code: *code, jt, jf, k: *k }
        });
        all.collect()
    }
}

/// The program: it returns how many bytes of a frame are kept, 0 where it is not wanted.
pub(crate) fn program(request: &CaptureRequest, snap_length: u32) -> Vec<libc::sock_filter> {
    let mut assembler = Assembler::default();
    let (yes, no) = (assembler.label(), assembler.label());
    if let Some(test) = test(request) {
        assembler.test(&test, yes, no);
    }
    assembler.place(yes);
    assembler.plain(RETURN, snap_length);
    assembler.place(no);
    assembler.plain(RETURN, 0);
    assembler.finish()
}

/// `None`: every frame.
fn test(request: &CaptureRequest) -> Option<Test> {
    let ranges = [request.source, request.dest, request.host];
    let ports = [request.source_port, request.dest_port, request.port];
    let anything =
        request.protocol.is_none() && ranges.iter().all(Option::is_none) && ports.iter().all(Option::is_none);
    if anything {
        return None;
    }
    let has = |wanted: fn(&IpAddr) -> bool| ranges.iter().flatten().all(|range| wanted(&range.address));
    let mut families = Vec::new();
    if has(IpAddr::is_ipv4) {
        families.push(family(request, &V4));
    }
    if has(IpAddr::is_ipv6) {
        families.push(family(request, &V6));
    }
    // Addresses of both kinds at once are in no packet.
    Some(if families.is_empty() { Test::Is(Field { mask: 0, ..field(12, 2) }, 1) } else { Test::Any(families) })
}

/// Where things are in a frame.
struct Layout {
    kind: u32,
    protocol: u32,
    icmp: u32,
    source: u32,
    dest: u32,
    source_port: Field,
}

const V4: Layout = Layout {
    kind: 0x0800,
    protocol: 23,
    icmp: 1,
    source: 26,
    dest: 30,
    source_port: Field { at: 14, size: 2, mask: u32::MAX, after_header: true },
};
const V6: Layout = Layout {
    kind: 0x86dd,
    protocol: 20,
    icmp: 58,
    source: 22,
    dest: 38,
    source_port: Field { at: 54, size: 2, mask: u32::MAX, after_header: false },
};

fn family(request: &CaptureRequest, layout: &Layout) -> Test {
    let mut all = vec![Test::Is(field(12, 2), layout.kind)];
    let protocol = |number: u32| Test::Is(field(layout.protocol, 1), number);
    match request.protocol {
        Some(Protocol::Tcp) => all.push(protocol(TCP)),
        Some(Protocol::Udp) => all.push(protocol(UDP)),
        Some(Protocol::Icmp) => all.push(protocol(layout.icmp)),
        None => {}
    }
    let address = |at: u32, range: &Range| Test::All(address(at, range));
    all.extend(request.source.iter().map(|range| address(layout.source, range)));
    all.extend(request.dest.iter().map(|range| address(layout.dest, range)));
    let either = |range| Test::Any(vec![address(layout.source, range), address(layout.dest, range)]);
    all.extend(request.host.iter().map(either));
    let source = |port: u16| Test::Is(layout.source_port, port.into());
    let dest = |port: u16| Test::Is(Field { at: layout.source_port.at + 2, ..layout.source_port }, port.into());
    if request.source_port.or(request.dest_port).or(request.port).is_some() {
        all.push(Test::Any(vec![protocol(TCP), protocol(UDP)]));
        if layout.kind == V4.kind {
            all.push(Test::Is(Field { mask: 0x1fff, ..field(20, 2) }, 0));
        }
    }
    all.extend(request.source_port.map(source));
    all.extend(request.dest_port.map(dest));
    all.extend(request.port.map(|port| Test::Any(vec![source(port), dest(port)])));
    Test::All(all)
}

/// The bits of an address that count, word by word; one test at least, that always holds for a range of everything.
fn address(at: u32, range: &Range) -> Vec<Test> {
    let bytes = match range.address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let words = bytes.chunks_exact(4).map(|word| word.iter().fold(0, |all, byte| all << 8 | u32::from(*byte)));
    let tests = words.zip(0u32..).map(|(word, number)| {
        let bits = u32::from(range.prefix).saturating_sub(number * 32).min(32);
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
        (mask != 0 || number == 0).then(|| Test::Is(Field { mask, ..field(at + number * 4, 4) }, word & mask))
    });
    tests.flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel does: what lies outside of the frame ends it with 0.
    fn run(program: &[libc::sock_filter], frame: &[u8]) -> u32 {
        let (mut a, mut x, mut at) = (0u32, 0u32, 0usize);
        let number = |place: usize, size: usize| {
            let bytes = frame.get(place..place + size)?;
            Some(bytes.iter().fold(0u32, |all, byte| all << 8 | u32::from(*byte)))
        };
        loop {
            let step = program[at];
            at += 1;
            let k = step.k as usize;
            let loaded = match step.code {
                0x30 => number(k, 1),
                0x28 => number(k, 2),
                0x20 => number(k, 4),
                0x48 => number(x as usize + k, 2),
                0xb1 => number(k, 1).inspect(|byte| x = (byte & 15) * 4).map(|_| a),
                0x54 => Some(a & step.k),
                0x15 => {
                    at += usize::from(if a == step.k { step.jt } else { step.jf });
                    Some(a)
                }
                0x06 => return step.k,
                other => panic!("{other:#x} is not known"),
            };
            match loaded {
                Some(value) => a = value,
                None => return 0,
            }
        }
    }

    fn v4(protocol: u8, source: [u8; 4], dest: [u8; 4], ports: (u16, u16)) -> Vec<u8> {
        let mut frame = vec![0; 12];
        // A header with one word of options.
        frame.extend([0x08, 0, 0x46, 0, 0, 60, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
        frame.extend(source.iter().chain(&dest).chain(&[1, 1, 1, 1]));
        frame.extend(ports.0.to_be_bytes().iter().chain(&ports.1.to_be_bytes()).chain(&[0; 16]));
        frame
    }

    fn v6(protocol: u8, source: &str, dest: &str, ports: (u16, u16)) -> Vec<u8> {
        let octets = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 64]);
        frame.extend(octets(source).iter().chain(&octets(dest)));
        frame.extend(ports.0.to_be_bytes().iter().chain(&ports.1.to_be_bytes()).chain(&[0; 16]));
        frame
    }

    #[test]
    fn what_is_asked_for_passes_and_nothing_else() {
        let one = || v4(6, [10, 1, 2, 3], [10, 9, 0, 1], (5555, 80));
        let frames = [
            ("web", one()),
            ("answer", v4(6, [10, 9, 0, 1], [10, 1, 2, 3], (80, 5555))),
            ("dns", v4(17, [10, 1, 2, 3], [192, 0, 2, 53], (4444, 53))),
            ("ping", v4(1, [10, 1, 2, 3], [10, 9, 0, 1], (80, 80))),
            ("web6", v6(6, "fd00::1:1", "fd00::2:2", (5555, 80))),
            ("ping6", v6(58, "fd00::1:1", "fd00::2:2", (0, 0))),
            ("fragment", [&one()[..20], &[0x00, 0x10], &one()[22..]].concat()),
            ("arp", [&[0; 12][..], &[0x08, 0x06], &[0; 28]].concat()),
            ("short", vec![0x08; 13]),
        ];
        let all: Vec<&str> = frames.iter().map(|(name, _)| *name).collect();
        for (query, wanted) in [
            ("", &all[..]),
            ("protocol=tcp", &["web", "answer", "web6", "fragment"]),
            ("protocol=udp", &["dns"]),
            ("protocol=icmp", &["ping", "ping6"]),
            ("protocol=icmpv4&source=10.1.2.3", &["ping"]),
            ("source=10.1.2.3", &["web", "dns", "ping", "fragment"]),
            ("source=10.1.0.0/16&destPort=80", &["web"]),
            ("source=10.1.2.3&dest=10.9.0.0/17", &["web", "ping", "fragment"]),
            ("host=10.9.0.1/32", &["web", "answer", "ping", "fragment"]),
            ("dest=192.0.2.0/26", &["dns"]),
            ("dest=192.0.2.64/26", &[]),
            ("host=0.0.0.0/0", &["web", "answer", "dns", "ping", "fragment"]),
            ("port=80", &["web", "answer", "web6"]),
            ("sourcePort=80", &["answer"]),
            ("protocol=udp&port=80", &[]),
            ("host=fd00::/16", &["web6", "ping6"]),
            ("source=fd00::1:0/112&dest=fd00::2:2&port=80", &["web6"]),
            ("source=fd00::1:0/113&dest=fd00::2:3", &[]),
            ("source=10.1.2.3&dest=fd00::2:2", &[]),
            ("host=::/0", &["web6", "ping6"]),
        ] {
            let request: CaptureRequest = joey_rpc::parse_query(query).unwrap();
            let program = program(&request, 96);
            let passed: Vec<&str> =
                frames.iter().filter(|(_, frame)| run(&program, frame) == 96).map(|(name, _)| *name).collect();
            assert_eq!(passed, wanted, "{query}");
        }
        for wrong in ["protocol=sctp", "source=10.0.0/8", "port=70000", "interfaces=eth0"] {
            assert!(joey_rpc::parse_query::<CaptureRequest>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_longest_program_has_no_jump_too_far() {
        let range = "fd00:1:2:3:4:5:6:7".parse().ok();
        let request = CaptureRequest {
            source: range,
            dest: range,
            host: range,
            source_port: Some(1),
            dest_port: Some(2),
            port: Some(3),
            protocol: Some(Protocol::Tcp),
            ..CaptureRequest::default()
        };
        let length = program(&request, 1).len();
        assert!((20..255).contains(&length), "{length}");
    }
}
