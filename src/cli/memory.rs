//! How much memory this process may still take.

use std::fs;

/// Where control groups say what they may take, take, and take for cached files: version 2, version 1.
const GROUPS: [[&str; 3]; 2] = [
    [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
    ],
    [
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ],
];

/// The least of what the machine has available and what this process' control group has left; `None` where the system does not say.
pub(super) fn free_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available(&text));
    let group = GROUPS.iter().find_map(|[limit, usage, statistics]| {
        let limit = number(&fs::read_to_string(limit).ok()?)?;
        let usage = number(&fs::read_to_string(usage).ok()?)?;
        let statistics = fs::read_to_string(statistics).unwrap_or_default();
        Some(left(limit, usage, &statistics))
    });
    machine.into_iter().chain(group).min()
}

/// Of a control group. Cached files (the model's own, for one) count as used there, but give way.
fn left(limit: u64, usage: u64, statistics: &str) -> u64 {
    let of = |name: &str| {
        let lines = statistics.lines().filter_map(|line| line.split_once(' '));
        let mut found = lines.filter(|(key, _)| *key == name);
        found.find_map(|(_, value)| number(value)).unwrap_or(0)
    };
    let files = of("inactive_file").saturating_add(of("active_file"));
    limit.saturating_sub(usage.saturating_sub(files))
}

/// `MemAvailable` of `/proc/meminfo`.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    number(line.trim().strip_suffix("kB")?)?.checked_mul(1024)
}

/// `None` for `max`, too.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_kibibytes() {
        let text = "MemTotal:       24576000 kB\nMemAvailable:   20480000 kB\n";
        assert_eq!(available(text), Some(20_480_000 * 1024));
        assert_eq!(available("MemTotal: 1 kB"), None);
        assert_eq!(number("max\n"), None);
    }

    #[test]
    fn cached_files_do_not_count_as_used() {
        let statistics = "anon 100\ninactive_file 300\nactive_file 500\n";
        assert_eq!(left(1000, 900, statistics), 900);
        assert_eq!(left(1000, 900, ""), 100);
        assert_eq!(left(1000, 2000, ""), 0);
    }
}
