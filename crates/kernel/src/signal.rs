//! Signals by name, as images and Pods write them.

/// `SIGTERM`, `TERM` or `15`; what is none of them is SIGTERM.
pub fn number(text: &str) -> i32 {
    let name = text.trim().to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let real_time = |first: i32, more: &str| more.parse::<i32>().ok().map(|more| first + more);
    let number = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    let number = number
        .or_else(|| name.strip_prefix("RTMIN+").and_then(|more| real_time(34, more)))
        .or_else(|| name.strip_prefix("RTMAX-").and_then(|less| real_time(64, &format!("-{less}"))))
        .or_else(|| name.parse().ok())
        .unwrap_or(libc::SIGTERM);
    if (1..=64).contains(&number) { number } else { libc::SIGTERM }
}

/// signal(7), and the real-time ones as glibc numbers them.
const NAMES: [(&str, i32); 31] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, wanted) in [
            ("SIGQUIT", 3),
            ("quit", 3),
            (" 10 ", 10),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("", 15),
            ("SIGNONE", 15),
            ("99", 15),
            ("-9", 15),
        ] {
            assert_eq!(number(text), wanted, "{text}");
        }
    }
}
