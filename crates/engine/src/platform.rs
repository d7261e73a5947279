//! What the kinds of VM differ in, as a table of facts.

use core::fmt;

use crate::Visibility;

/// What becomes of a page's bytes when it is converted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Contents {
    /// They stay.
    Preserve,
    /// They become zeros.
    Zero,
    /// Whatever is cheapest; the caller reads nothing from them.
    Unspecified,
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Preserve => "preserve",
            Self::Zero => "zero",
            Self::Unspecified => "unspecified",
        })
    }
}

/// The kind of VM that the memory belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Platform {
    /// An ordinary VM. The VMM decides; a guest access is neither private nor shared.
    Plain,
    /// KVM's software-protected VM (`KVM_X86_SW_PROTECTED_VM`, Linux
    /// `Documentation/virt/kvm/api.rst`, `KVM_CREATE_VM`). The VMM decides; a guest access is
    /// private or shared and has to agree with what is granted.
    SwProtected,
    /// AMD SEV-SNP. The guest asks by a page state change, and the VMM does it; a guest access is
    /// private or shared (the C-bit) and has to agree with what is granted and with the RMP. See
    /// `docs/snp.md`.
    Snp,
    /// A protected VM under pKVM. The guest alone decides, by its own share and unshare; a guest
    /// access is neither private nor shared. See `docs/pkvm.md`.
    Pkvm,
}

impl Platform {
    /// Whether a guest access says if it is to private or to shared memory.
    pub const fn tells_accesses_apart(self) -> bool {
        match self {
            Self::Plain | Self::Pkvm => false,
            Self::SwProtected | Self::Snp => true,
        }
    }

    /// Whether hardware keeps a table of who owns each frame (the RMP), which a conversion changes.
    pub const fn has_rmp(self) -> bool {
        match self {
            Self::Plain | Self::SwProtected | Self::Pkvm => false,
            Self::Snp => true,
        }
    }

    /// Whether the host can write the contents of private pages. An SNP guest's are encrypted by a
    /// key that the host has not; the firmware's `SNP_LAUNCH_UPDATE` takes pages before the guest
    /// starts only (SEV-SNP firmware ABI, 56860): [`Engine::preload`](crate::Engine::preload). A
    /// page of pKVM's is the host's until the guest first touches it.
    pub const fn host_fills_private(self) -> bool {
        match self {
            Self::Plain | Self::SwProtected | Self::Pkvm => true,
            Self::Snp => false,
        }
    }

    /// Whether nobody but the guest changes what is private and what is shared: a VMM's wish
    /// changes nothing.
    pub const fn guest_decides(self) -> bool {
        matches!(self, Self::Pkvm)
    }

    /// Whether a hypervisor keeps the guest's stage 2, and the host can take nothing out of it.
    pub const fn hypervisor_keeps_stage2(self) -> bool {
        matches!(self, Self::Pkvm)
    }

    /// Whether private pages can go to other memory. Those of pKVM's are moved by the hypervisor;
    /// those of an SNP guest only the firmware could (`SNP_PAGE_MOVE`), which is not modelled.
    pub const fn moves_private(self) -> bool {
        match self {
            Self::Plain | Self::SwProtected | Self::Pkvm => true,
            Self::Snp => false,
        }
    }

    /// Whether a conversion to `to` can do to the contents what is asked. Memory in place is the
    /// same memory afterwards; with two pools the other side's page is a fresh one of zeros.
    ///
    /// Of an SNP guest nothing is preserved: what was private is ciphertext to the host, what was
    /// shared is garbage to the guest. Zeros can be had where the host has the last word, that is
    /// to shared; a page that becomes private has what its guest writes after validating it. Under
    /// pKVM all of it is the guest's: its contents stay, and zeros are the guest's to write.
    pub const fn offers(self, contents: Contents, to: Visibility, in_place: bool) -> bool {
        match (self, contents) {
            (Self::Plain | Self::SwProtected, Contents::Preserve) => in_place,
            (Self::Pkvm, Contents::Preserve) => true,
            (Self::Pkvm, Contents::Zero) => false,
            (Self::Snp, Contents::Preserve) => false,
            (Self::Plain | Self::SwProtected, Contents::Zero) => true,
            (Self::Snp, Contents::Zero) => matches!(to, Visibility::Shared),
            (_, Contents::Unspecified) => true,
        }
    }

    /// The treatment on offer that keeps most: all, or else zeros, or else nothing that is said.
    pub const fn keeps_most(self, to: Visibility, in_place: bool) -> Contents {
        if self.offers(Contents::Preserve, to, in_place) {
            Contents::Preserve
        } else if self.offers(Contents::Zero, to, in_place) {
            Contents::Zero
        } else {
            Contents::Unspecified
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Plain => "plain",
            Self::SwProtected => "sw-protected",
            Self::Snp => "snp",
            Self::Pkvm => "pkvm",
        })
    }
}
