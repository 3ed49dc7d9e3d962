//! What a monitor's process takes of the host's memory.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;

/// Bytes of memory that a process has for itself alone.
pub fn own_memory(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Bytes of memory that translated instructions take in a monitor: what is written and executed.
pub fn translated(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let sizes = text.split(" rwxp ").skip(1).filter_map(|region| {
        let line = region.lines().find_map(|line| line.strip_prefix("Rss:"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    });
    sizes.sum::<u64>() << 10
}

/// Bytes of a machine's own memory that are as they are in the template which it is a copy of.
pub fn same_as_in_template(pid: u32) -> usize {
    let own = |name: &str| File::open(format!("/proc/{pid}/{name}")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let is_memory = |line: &&str| line.contains("memfd:joey-memory") && line.contains(" rw-p ");
    let line = maps.lines().find(is_memory).expect("a copy's memory is its own where it writes it");
    let (begin, end) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')).unwrap();
    let [begin, end] = [begin, end].map(|digits| usize::from_str_radix(digits, 16).unwrap());
    let mut files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let is_template = |path: &std::path::PathBuf| {
        fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("memfd:joey-memory"))
    };
    let template = File::open(files.find(is_template).expect("the monitor has the template open")).unwrap();
    let (memory, mut told) = (own("mem"), vec![0; (end - begin) / PAGE * 8]);
    own("pagemap").read_exact_at(&mut told, (begin / PAGE * 8) as u64).unwrap();
    let is_same = |number: usize| {
        let (mut here, mut there) = ([0; PAGE], [0; PAGE]);
        memory.read_exact_at(&mut here, (begin + number * PAGE) as u64).unwrap();
        template.read_exact_at(&mut there, (number * PAGE) as u64).unwrap();
        here == there
    };
    // In memory, and not the file's (Documentation/admin-guide/mm/pagemap.rst).
    let is_own = |word: u64| word >> 63 == 1 && word >> 61 & 1 == 0;
    let words = told.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    words.enumerate().filter(|(number, word)| is_own(*word) && is_same(*number)).count() * PAGE
}
