//! How much memory this process may still take.

use std::fs;

/// Where the system does not say.
const UNKNOWN_BYTES: u64 = 4 << 30;

/// The least of what the machine has available and what this process' control group has left.
pub(super) fn free_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available(&text));
    let groups = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ];
    let group = groups.into_iter().find_map(|(limit, usage)| {
        let limit = number(&fs::read_to_string(limit).ok()?)?;
        let usage = number(&fs::read_to_string(usage).ok()?)?;
        Some(limit.saturating_sub(usage))
    });
    machine
        .into_iter()
        .chain(group)
        .min()
        .unwrap_or(UNKNOWN_BYTES)
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
}
