//! What brings what is missing: a command, a kernel's version, or another machine.

use std::io::{Error, ErrorKind};

use super::facts::Facts;
use super::machine::Device;

/// Permission that is refused whoever asks: to a device by a container, to a call by privilege.
const EPERM: i32 = 1;

/// What makes `/dev/kvm` open.
pub(super) fn open_kvm(error: &Error, facts: &Facts) -> String {
    let module = match facts.machine.vendor.as_deref() {
        Some("AuthenticAMD" | "HygonGenuine") => "kvm_amd",
        _ => "kvm_intel",
    };
    match error.kind() {
        ErrorKind::NotFound if facts.machine.kvm_module => {
            "in a container: start it with --device /dev/kvm; else mount a devtmpfs on /dev".into()
        }
        ErrorKind::PermissionDenied if error.raw_os_error() == Some(EPERM) => {
            "start the container with --device /dev/kvm".into()
        }
        ErrorKind::PermissionDenied => leave("/dev/kvm", facts.machine.kvm.as_ref()),
        // What opens and is not KVM comes without an errno.
        kind if kind == ErrorKind::IsADirectory || error.raw_os_error().is_none() => {
            format!("remove what stands at /dev/kvm, and run sudo modprobe {module}")
        }
        _ => format!("enable virtualisation in the firmware, and run sudo modprobe {module}"),
    }
}

/// What gives this user read and write access to a device.
fn leave(path: &str, device: Option<&Device>) -> String {
    const GROUP_READS_AND_WRITES: u32 = 0o060;
    let group = device
        .filter(|device| device.mode & GROUP_READS_AND_WRITES == GROUP_READS_AND_WRITES)
        .and_then(|device| device.group.as_deref())
        .filter(|group| *group != "root");
    match group {
        Some(group) => format!("sudo usermod -aG {group} $USER, and log in again"),
        None => format!("sudo setfacl -m u:$USER:rw {path}"),
    }
}

/// What lets this user watch the kernel's touches.
pub(super) fn watch(error: &Error, facts: &Facts) -> String {
    let machine = &facts.machine;
    match error.kind() {
        ErrorKind::PermissionDenied if machine.unprivileged_userfaultfd == Some(true) => {
            "the call is filtered: start the container with --security-opt seccomp=unconfined"
                .into()
        }
        ErrorKind::PermissionDenied => {
            let sysctl = "sudo sysctl vm.unprivileged_userfaultfd=1";
            match machine.userfaultfd.as_ref() {
                Some(device) => {
                    format!("{}; or {sysctl}", leave("/dev/userfaultfd", Some(device)))
                }
                None => sysctl.into(),
            }
        }
        _ => "use a kernel with CONFIG_USERFAULTFD".into(),
    }
}

/// The version that brought something, or, where the kernel is of that version, how it is built
/// with it.
pub(super) fn kernel(facts: &Facts, version: (u32, u32), built: &str) -> String {
    let (major, minor) = version;
    match facts.kernel_since(version) {
        Some(true) => format!("use a kernel with {built}"),
        _ => format!("use Linux {major}.{minor} or newer, with {built}"),
    }
}

/// What brings two-stage paging.
pub(super) const TDP: &str = "use a machine with EPT or NPT: bare metal, or a VM with nested \
                              virtualisation; this KVM has shadow paging";

#[cfg(test)]
mod tests {
    use super::super::facts::tests::bare;
    use super::*;

    fn os(errno: i32) -> Error {
        Error::from_raw_os_error(errno)
    }

    #[test]
    fn each_way_in_which_kvm_does_not_open_has_its_own_way_out() {
        let device = |mode, group: &str| Some(Device { mode, group: Some(group.into()) });
        for (error, device, expected) in [
            (os(2), None, "modprobe kvm_intel"),
            (os(13), device(0o660, "kvm"), "usermod -aG kvm $USER"),
            (os(13), device(0o600, "root"), "setfacl -m u:$USER:rw /dev/kvm"),
            (os(13), device(0o640, "kvm"), "setfacl"),
            (os(13), None, "setfacl"),
            (os(1), None, "--device /dev/kvm"),
            (os(6), None, "modprobe"),
            (os(21), None, "remove what stands at /dev/kvm"),
            (Error::other("speaks version -1"), None, "remove what stands at /dev/kvm"),
        ] {
            let mut facts = bare();
            facts.machine.kvm = device;
            let way_out = open_kvm(&error, &facts);
            assert!(way_out.contains(expected), "{error}: {way_out}");
        }
        let mut facts = bare();
        facts.machine.kvm_module = true;
        facts.machine.vendor = Some("AuthenticAMD".into());
        assert!(open_kvm(&os(2), &facts).contains("--device"));
        assert!(open_kvm(&os(19), &facts).contains("kvm_amd"));
    }

    #[test]
    fn userfaultfd_is_brought_by_leave_or_by_the_kernel() {
        let mut facts = bare();
        assert!(watch(&os(38), &facts).contains("CONFIG_USERFAULTFD"));
        assert_eq!(watch(&os(1), &facts), "sudo sysctl vm.unprivileged_userfaultfd=1");
        facts.machine.userfaultfd = Some(Device { mode: 0o600, group: None });
        assert!(watch(&os(1), &facts).starts_with("sudo setfacl -m u:$USER:rw /dev/userfaultfd"));
        facts.machine.unprivileged_userfaultfd = Some(true);
        assert!(watch(&os(1), &facts).contains("seccomp"));
    }

    #[test]
    fn a_kernel_that_is_new_enough_lacks_an_option() {
        let mut facts = bare();
        assert_eq!(kernel(&facts, (6, 8), "CONFIG_X"), "use Linux 6.8 or newer, with CONFIG_X");
        facts.machine.kernel = Some("6.12.3".into());
        assert_eq!(kernel(&facts, (6, 8), "CONFIG_X"), "use a kernel with CONFIG_X");
    }
}
