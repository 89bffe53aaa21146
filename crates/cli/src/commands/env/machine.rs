//! Processor and memory, from `/proc` and the cgroup file system (absent elsewhere).

use std::path::{Path, PathBuf};

/// The first processor's name.
pub(super) fn cpu_model() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name") || line.starts_with("Processor"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Of the instruction sets that kernels here, or in what they are built on, choose from, those that this processor has.
pub(super) fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let all = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("f16c", is_x86_feature_detected!("f16c")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
            ("avxvnni", is_x86_feature_detected!("avxvnni")),
        ];
        all.into_iter().filter(|(_, found)| *found).map(|(name, _)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

/// Bytes of memory in the machine.
pub(super) fn total_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The tightest memory limit of the control groups this process is in.
pub(super) fn cgroup_limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let limits = groups.lines().flat_map(limit_files).filter_map(|path| limit(&std::fs::read_to_string(path).ok()?));
    limits.min()
}

/// The files that may hold a limit for one line of `/proc/self/cgroup`, `number:controllers:path`: the group's own and
/// those of the groups around it.
fn limit_files(line: &str) -> Vec<PathBuf> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { return Vec::new() };
    let (root, file) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max"),
        all if all.split(',').any(|name| name == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        _ => return Vec::new(),
    };
    let inner = Path::new(path.trim_start_matches('/'));
    // In a container the path is the host's; its root is the container's own group.
    inner.ancestors().map(|group| Path::new(root).join(group).join(file)).collect()
}

/// `max`, or cgroup 1's largest page count, is no limit.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok().filter(|bytes| *bytes < 1 << 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_looked_for_in_all_groups_around() {
        let names =
            |line: &str| -> Vec<String> { limit_files(line).iter().map(|path| path.display().to_string()).collect() };
        let wanted = ["/sys/fs/cgroup/a/b/memory.max", "/sys/fs/cgroup/a/memory.max", "/sys/fs/cgroup/memory.max"];
        assert_eq!(names("0::/a/b"), wanted);
        assert_eq!(names("7:cpu,memory:/"), ["/sys/fs/cgroup/memory/memory.limit_in_bytes"]);
        assert!(names("3:cpuset:/a").is_empty() && names("nonsense").is_empty());
        assert_eq!(limit("1048576\n"), Some(1 << 20));
        assert_eq!((limit("max\n"), limit("9223372036854771712"), limit("")), (None, None, None));
    }
}
