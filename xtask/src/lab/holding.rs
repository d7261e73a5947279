//! A command in the lab beside a VM that does nothing.
//!
//! KVM patches the running kernel when the first VM comes or the last goes, and so with the first
//! vCPU: jump labels, one of them in the scheduler. QEMU's CPUs, each on a thread of its own, may
//! come upon the breakpoint of a patch that is over, and the kernel dies of it. A VM that stays
//! leaves nothing to patch.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

/// What `xtask` is called with in the lab; the command follows.
pub(crate) const NAME: &str = "holding-a-vm";

/// Runs the command that its arguments are.
pub(crate) fn main(mut command: impl Iterator<Item = OsString>) -> ExitCode {
    // Where there is no KVM, there is nothing that it patches.
    let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let vcpu = vm.as_ref().ok().and_then(|vm| vm.create_vcpu(0).ok());
    let program = command.next().unwrap_or_default();
    let status = Command::new(&program).args(command).status();
    drop((vcpu, vm));
    match status {
        // One that a signal ended has no status of its own.
        Ok(status) => {
            status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX).into()
        }
        Err(why) => {
            eprintln!("{}: {why}", program.display());
            ExitCode::from(127)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_the_commands() {
        let run = |words: &[&str]| main(words.iter().map(OsString::from));
        assert_eq!(run(&["sh", "-c", "exit 3"]), ExitCode::from(3));
        assert_eq!(run(&["true"]), ExitCode::SUCCESS);
        assert_eq!(run(&["/no/such/program"]), ExitCode::from(127));
    }
}
