//! What the kernel's files say of the machine and of this process. A file that can't be read is a
//! finding, not an error.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::parse::{self, Limit};

/// What the files say; `None` where they don't.
#[derive(Default, Debug)]
pub(super) struct Machine {
    pub(super) kernel: Option<String>,
    pub(super) cpu: Option<String>,
    /// Of the CPU: `GenuineIntel` and the like.
    pub(super) vendor: Option<String>,
    /// Whether the kernel has KVM in it or loaded.
    pub(super) kvm_module: bool,
    pub(super) parameters: Parameters,
    pub(super) kvm: Option<Device>,
    pub(super) userfaultfd: Option<Device>,
    pub(super) unprivileged_userfaultfd: Option<bool>,
    /// By size.
    pub(super) huge_pages: Vec<Pool>,
    /// The choice for all sizes.
    pub(super) shmem: Option<String>,
    /// The choices by size in bytes.
    pub(super) shmem_sizes: Vec<(u64, String)>,
    pub(super) limits: Limits,
    /// Files that should be there and could not be read, and why.
    pub(super) unread: Vec<String>,
}

/// Parameters of KVM's modules that tell how it pages.
#[derive(Default, Debug)]
pub(super) struct Parameters {
    pub(super) tdp_mmu: Option<bool>,
    pub(super) ept: Option<bool>,
    pub(super) npt: Option<bool>,
}

/// The file of a device.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) mode: u32,
    /// The group that owns it.
    pub(super) group: Option<String>,
}

/// Huge pages of a size.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) bytes: u64,
    pub(super) total: Option<u64>,
    pub(super) free: Option<u64>,
    pub(super) reserved: Option<u64>,
}

/// What bounds this process.
#[derive(Default, Debug)]
pub(super) struct Limits {
    pub(super) address_space: Option<Limit>,
    pub(super) locked_memory: Option<Limit>,
    pub(super) open_files: Option<Limit>,
    pub(super) max_map_count: Option<u64>,
    pub(super) memory_total: Option<u64>,
    pub(super) memory_free: Option<u64>,
    pub(super) memory_available: Option<u64>,
}

const HUGE_PAGES: &str = "sys/kernel/mm/hugepages";
const THP: &str = "sys/kernel/mm/transparent_hugepage";

impl Machine {
    /// Reads the files below `root`.
    pub(super) fn read(root: &Path) -> Self {
        let mut files = Files { root, unread: Vec::new() };
        let cpu = files.text("proc/cpuinfo").unwrap_or_default();
        let groups = files.quiet("etc/group").unwrap_or_default();
        let owned = |text: &str| text.to_owned();
        let mut machine = Self {
            kernel: files.text("proc/sys/kernel/osrelease").map(|text| owned(text.trim())),
            cpu: parse::field(&cpu, "model name").map(owned),
            vendor: parse::field(&cpu, "vendor_id").map(owned),
            kvm_module: root.join("sys/module/kvm").is_dir(),
            parameters: Parameters {
                tdp_mmu: files.switch("sys/module/kvm/parameters/tdp_mmu"),
                ept: files.switch("sys/module/kvm_intel/parameters/ept"),
                npt: files.switch("sys/module/kvm_amd/parameters/npt"),
            },
            kvm: device(&root.join("dev/kvm"), &groups),
            userfaultfd: device(&root.join("dev/userfaultfd"), &groups),
            unprivileged_userfaultfd: files.switch("proc/sys/vm/unprivileged_userfaultfd"),
            huge_pages: files.pools(),
            shmem: files.choice(&format!("{THP}/shmem_enabled")),
            shmem_sizes: files.choices(),
            limits: files.limits(),
            unread: Vec::new(),
        };
        machine.unread = files.unread;
        machine
    }
}

/// A folder to read in, and what could not be read there.
struct Files<'a> {
    root: &'a Path,
    unread: Vec<String>,
}

impl Files<'_> {
    /// A file that should be there.
    fn text(&mut self, path: &str) -> Option<String> {
        match fs::read_to_string(self.root.join(path)) {
            Ok(text) => Some(text),
            Err(error) => {
                self.unread.push(format!("/{path}: {error}"));
                None
            }
        }
    }

    /// A file that need not be there.
    fn quiet(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok()
    }

    fn switch(&self, path: &str) -> Option<bool> {
        parse::switch(&self.quiet(path)?)
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.quiet(path)?.trim().parse().ok()
    }

    fn choice(&self, path: &str) -> Option<String> {
        parse::chosen(&self.quiet(path)?).map(str::to_owned)
    }

    /// The page sizes that have a folder in this one, ascending, with the folder's name.
    fn sizes(&self, path: &str) -> Vec<(u64, String)> {
        let entries = fs::read_dir(self.root.join(path)).into_iter().flatten().flatten();
        let mut sizes: Vec<_> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                Some((parse::page_size(&name)?, name))
            })
            .collect();
        sizes.sort();
        sizes
    }

    fn pools(&self) -> Vec<Pool> {
        let pool = |(bytes, name)| {
            let number = |file| self.number(&format!("{HUGE_PAGES}/{name}/{file}"));
            Pool {
                bytes,
                total: number("nr_hugepages"),
                free: number("free_hugepages"),
                reserved: number("resv_hugepages"),
            }
        };
        self.sizes(HUGE_PAGES).into_iter().map(pool).collect()
    }

    fn choices(&self) -> Vec<(u64, String)> {
        let choice =
            |(bytes, name)| Some((bytes, self.choice(&format!("{THP}/{name}/shmem_enabled"))?));
        self.sizes(THP).into_iter().filter_map(choice).collect()
    }

    fn limits(&mut self) -> Limits {
        let limits = self.text("proc/self/limits").unwrap_or_default();
        let memory = self.text("proc/meminfo").unwrap_or_default();
        Limits {
            address_space: parse::limit(&limits, "Max address space"),
            locked_memory: parse::limit(&limits, "Max locked memory"),
            open_files: parse::limit(&limits, "Max open files"),
            max_map_count: self.number("proc/sys/vm/max_map_count"),
            memory_total: parse::kib_field(&memory, "MemTotal"),
            memory_free: parse::kib_field(&memory, "MemFree"),
            memory_available: parse::kib_field(&memory, "MemAvailable"),
        }
    }
}

fn device(path: &Path, groups: &str) -> Option<Device> {
    let metadata = fs::metadata(path).ok()?;
    let group = parse::group(groups, metadata.gid()).map(str::to_owned);
    Some(Device { mode: metadata.mode(), group })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_files_is_all_findings() {
        let machine = Machine::read(Path::new("/no/such/folder"));
        assert_eq!((&machine.kernel, &machine.cpu), (&None, &None));
        assert!(machine.kvm.is_none() && machine.huge_pages.is_empty());
        let unread = machine.unread.join("\n");
        for path in ["/proc/cpuinfo", "/proc/sys/kernel/osrelease", "/proc/self/limits"] {
            assert!(unread.contains(path), "{unread}");
        }
    }

    #[test]
    fn this_machine_is_read() {
        let machine = Machine::read(Path::new("/"));
        assert!(machine.kernel.is_some_and(|release| parse::version(&release).is_some()));
        assert!(machine.limits.open_files.is_some());
        assert!(machine.huge_pages.is_sorted_by_key(|pool| pool.bytes));
    }
}
