//! All that was looked at, and how this KVM pages.

use std::io;
use std::path::Path;

use polder::HostKind;
use polder_vmm::RunError;
use polder_vmm::doctor::{Errno, KvmOffer, UserfaultOffer, Way};
use polder_vmm::scenario::Conversions;

use super::machine::Machine;
use super::parse;

/// What the machine offers, before any judgement.
pub(super) struct Facts {
    pub(super) machine: Machine,
    pub(super) kvm: Result<KvmOffer, RunError>,
    /// Fails where there is no userfaultfd at all for this process.
    pub(super) userfault: io::Result<Watch>,
    /// Whether host memfd was in fact set up, with a VM beside it.
    pub(super) memfd: Result<Conversions, RunError>,
    /// Whether host guest_memfd was, and what a guest's conversions come to there.
    pub(super) guest_memfd: Result<Conversions, RunError>,
}

/// What userfaultfd offers.
pub(super) struct Watch {
    /// How the kernel's touches may be watched, if they may.
    pub(super) way: io::Result<Way>,
    pub(super) features: Vec<&'static str>,
    /// Bits of features that have no name yet.
    pub(super) nameless: u64,
}

impl Facts {
    /// Looks at this machine.
    pub(super) fn look() -> Self {
        Self {
            machine: Machine::read(Path::new("/")),
            kvm: KvmOffer::ask(),
            userfault: Watch::look(),
            memfd: polder_vmm::check_kvm(HostKind::Memfd),
            guest_memfd: polder_vmm::check_kvm(HostKind::GuestMemfd),
        }
    }

    /// Whether the kernel is this version or newer; `None` if its version is not known.
    pub(super) fn kernel_since(&self, version: (u32, u32)) -> Option<bool> {
        Some(parse::version(self.machine.kernel.as_deref()?)? >= version)
    }

    /// The greatest value of a capability on a VM of any type; `None` if KVM could not be asked.
    pub(super) fn capability(&self, name: &str) -> Option<i32> {
        let kvm = self.kvm.as_ref().ok()?;
        kvm.types.iter().any(|of| of.capabilities.is_ok()).then(|| kvm.on_any(name))
    }

    /// The types of VMs that have one of these bits in the value of a capability; `None` if KVM
    /// could not be asked.
    pub(super) fn types_with(&self, name: &str, bits: i32) -> Option<Vec<String>> {
        self.capability(name)?;
        let types = self.kvm.as_ref().ok()?.types.iter();
        Some(types.filter(|of| of.value(name) & bits != 0).map(|of| of.name()).collect())
    }
}

impl Watch {
    fn look() -> io::Result<Self> {
        let os = |errno: Errno| io::Error::from_raw_os_error(errno.raw_os_error());
        let offer = UserfaultOffer::ask().map_err(|error| os(error.errno))?;
        Ok(Self {
            way: offer.way().map_err(|error| os(error.errno)),
            features: offer.features().collect(),
            nameless: offer.nameless(),
        })
    }
}

/// How a KVM translates a guest's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mmu {
    /// By a second stage of page tables: EPT or NPT.
    Tdp,
    /// By page tables of its own in place of the guest's.
    Shadow,
    Unknown,
}

impl Mmu {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Tdp => "tdp",
            Self::Shadow => "shadow",
            Self::Unknown => "unknown",
        }
    }

    /// What KVM uses, and what tells so.
    ///
    /// The capabilities come first, for they are answers of the KVM that runs: a module's
    /// parameter has its default also where another module serves. And `tdp_mmu=N` is no proof of
    /// shadow paging: KVM has an older MMU for two stages.
    pub(super) fn of(facts: &Facts) -> (Self, String) {
        for name in ["PRE_FAULT_MEMORY", "MEMORY_ATTRIBUTES"] {
            if facts.capability(name).is_some_and(|value| value > 0) {
                return (Self::Tdp, format!("KVM_CAP_{name} is there"));
            }
        }
        let since = facts.kernel_since((6, 11)) == Some(true);
        if since && facts.capability("PRE_FAULT_MEMORY") == Some(0) {
            let because = "KVM_CAP_PRE_FAULT_MEMORY, which needs tdp, is not there";
            return (Self::Shadow, because.into());
        }
        let parameters = &facts.machine.parameters;
        if facts.kvm.is_ok() && parameters.tdp_mmu == Some(true) {
            return (Self::Tdp, "module kvm has tdp_mmu=Y".into());
        }
        let vendor = facts.machine.vendor.as_deref();
        let (parameter, name) = match vendor {
            Some("GenuineIntel") => (parameters.ept, "module kvm_intel has ept"),
            Some("AuthenticAMD" | "HygonGenuine") => (parameters.npt, "module kvm_amd has npt"),
            _ => (None, ""),
        };
        match parameter {
            Some(true) => (Self::Tdp, format!("{name}=Y")),
            Some(false) => (Self::Shadow, format!("{name}=N")),
            None => (Self::Unknown, "neither a capability nor a module's parameter tells".into()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use polder_vmm::doctor::VmTypeOffer;
    use polder_vmm::guest::Transport;

    use super::super::machine::Parameters;
    use super::*;

    /// A machine with one kind of VM that has these capabilities, and all of userfaultfd.
    pub(in super::super) fn made_up(
        release: &str,
        capabilities: &[(&'static str, i32)],
        parameters: Parameters,
    ) -> Facts {
        let machine = Machine {
            kernel: Some(release.into()),
            vendor: Some("GenuineIntel".into()),
            parameters,
            ..Machine::default()
        };
        let default = VmTypeOffer { number: 0, capabilities: Ok(capabilities.to_vec()) };
        let kvm =
            KvmOffer { api_version: 12, types: vec![default], hypercalls: Ok(Transport::Port) };
        let features = vec!["MISSING_SHMEM", "MINOR_SHMEM", "POISON"];
        let watch = Watch { way: Ok(Way::SystemCall), features, nameless: 0 };
        Facts {
            machine,
            kvm: Ok(kvm),
            userfault: Ok(watch),
            memfd: Ok(Conversions::KeepContents),
            guest_memfd: Ok(Conversions::LoseContents),
        }
    }

    /// A machine with nothing.
    pub(in super::super) fn bare() -> Facts {
        let not_found = || io::Error::from_raw_os_error(2);
        Facts {
            machine: Machine::default(),
            kvm: Err(RunError::Kvm(not_found())),
            userfault: Err(io::Error::from_raw_os_error(38)),
            memfd: Err(RunError::Kvm(not_found())),
            guest_memfd: Err(RunError::Kvm(not_found())),
        }
    }

    #[test]
    fn how_kvm_pages_follows_from_what_it_says_first_and_its_parameters_then() {
        let parameters = |tdp_mmu, ept| Parameters { tdp_mmu, ept, npt: None };
        let (yes, no) = (Some(true), Some(false));
        for (release, capabilities, parameters, expected) in [
            ("6.12.1", &[("PRE_FAULT_MEMORY", 1)][..], parameters(no, no), Mmu::Tdp),
            ("6.8.0", &[("MEMORY_ATTRIBUTES", 8)], parameters(None, None), Mmu::Tdp),
            ("6.18.44", &[], parameters(no, yes), Mmu::Shadow),
            ("6.1.0", &[], parameters(yes, None), Mmu::Tdp),
            ("6.1.0", &[], parameters(no, yes), Mmu::Tdp),
            ("6.1.0", &[], parameters(no, no), Mmu::Shadow),
            ("6.1.0", &[], parameters(no, None), Mmu::Unknown),
            ("?", &[], parameters(None, None), Mmu::Unknown),
        ] {
            let facts = made_up(release, capabilities, parameters);
            let (found, because) = Mmu::of(&facts);
            assert_eq!(found, expected, "{release} {capabilities:?}: {because}");
        }
        assert_eq!(Mmu::of(&bare()).0, Mmu::Unknown);
    }
}
