//! How much memory the process may still take.

use std::fs;
use std::path::Path;

/// Where control groups are, a group's limit and use, and what of the use can be taken back.
struct Files {
    mount: &'static str,
    limit: &'static str,
    usage: &'static str,
    reclaimable: [&'static str; 2],
}

const V1: Files = Files {
    mount: "sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: ["total_active_file ", "total_inactive_file "],
};
const V2: Files = Files {
    mount: "sys/fs/cgroup",
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: ["active_file ", "inactive_file "],
};

/// Memory that can be had without swapping and within the limits of the process's control groups; a
/// modest guess where the system does not say.
pub fn available_bytes() -> u64 {
    available_below(Path::new("/"))
}

fn available_below(root: &Path) -> u64 {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let of_machine =
        number(&read("proc/meminfo"), "MemAvailable:").map_or(4 << 30, |kib| kib << 10);
    let groups = read("proc/self/cgroup");
    let of_groups = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let files = match controllers {
            "" => V2,
            _ if controllers.split(',').any(|it| it == "memory") => V1,
            _ => return None,
        };
        let mount = root.join(files.mount);
        // Each group above has its say too. A container may see its own as the mount's root.
        let path = Path::new(path.trim_start_matches('/'));
        path.ancestors().filter_map(|group| available_in(&mount.join(group), &files)).min()
    });
    of_groups.fold(of_machine, u64::min)
}

fn available_in(group: &Path, files: &Files) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let limit = number(&read(files.limit)?, "")?;
    let usage = number(&read(files.usage)?, "")?;
    let stat = read("memory.stat").unwrap_or_default();
    let reclaimable = files.reclaimable.iter().filter_map(|name| number(&stat, name)).sum();
    Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
}

/// The number behind `name` at the beginning of a line.
fn number(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn available(files: &[(&str, &str)]) -> u64 {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        available_below(root.path())
    }

    const MACHINE: (&str, &str) = ("proc/meminfo", "MemTotal: 90 kB\nMemAvailable:   2000 kB\n");

    #[test]
    fn the_smallest_of_machine_and_groups_counts() {
        assert_eq!(available(&[]), 4 << 30);
        assert_eq!(available(&[MACHINE]), 2000 << 10);
        let v2 = |limit, limit_above| {
            available(&[
                MACHINE,
                ("proc/self/cgroup", "0::/above/own\n"),
                ("sys/fs/cgroup/above/own/memory.max", limit),
                ("sys/fs/cgroup/above/own/memory.current", "700\n"),
                (
                    "sys/fs/cgroup/above/own/memory.stat",
                    "anon 1\ninactive_file 300\nactive_file 50\n",
                ),
                ("sys/fs/cgroup/above/memory.max", limit_above),
                ("sys/fs/cgroup/above/memory.current", "800\n"),
            ])
        };
        assert_eq!(v2("max\n", "max\n"), 2000 << 10);
        assert_eq!(v2("1000\n", "max\n"), 650);
        assert_eq!(v2("1000\n", "900\n"), 100);
        assert_eq!(v2("10\n", "max\n"), 0);
        let v1 = |own| {
            available(&[
                MACHINE,
                ("proc/self/cgroup", "9:cpu:/\n4:hugetlb,memory:/of/the/host\n0::/\n"),
                (&format!("sys/fs/cgroup/memory/{own}memory.limit_in_bytes"), "1000\n"),
                (&format!("sys/fs/cgroup/memory/{own}memory.usage_in_bytes"), "400\n"),
                (&format!("sys/fs/cgroup/memory/{own}memory.stat"), "total_inactive_file 5\n"),
            ])
        };
        assert_eq!((v1("of/the/host/"), v1("")), (605, 605));
    }
}
