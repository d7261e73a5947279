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
}

impl Platform {
    /// Whether a guest access says if it is to private or to shared memory.
    pub const fn tells_accesses_apart(self) -> bool {
        match self {
            Self::Plain => false,
            Self::SwProtected => true,
        }
    }

    /// Whether a conversion to `to` can do to the contents what is asked. Memory in place is the
    /// same memory afterwards; with two pools the other side's page is a fresh one of zeros.
    pub const fn offers(self, contents: Contents, _to: Visibility, in_place: bool) -> bool {
        match (self, contents) {
            (Self::Plain | Self::SwProtected, Contents::Preserve) => in_place,
            (Self::Plain | Self::SwProtected, Contents::Zero | Contents::Unspecified) => true,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Plain => "plain",
            Self::SwProtected => "sw-protected",
        })
    }
}
