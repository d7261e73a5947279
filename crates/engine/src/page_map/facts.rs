//! What is known of one page, and its two bits.

/// Who may see a page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Visibility {
    /// The guest alone.
    Private,
    /// Guest and host.
    Shared,
}

impl Visibility {
    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::Private => Self::Shared,
            Self::Shared => Self::Private,
        }
    }
}

impl core::fmt::Display for Visibility {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.pad(match self {
            Self::Private => "private",
            Self::Shared => "shared",
        })
    }
}

/// Whether a page's contents are there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Population {
    /// They must still come from somewhere before anybody may see the page.
    Owed,
    /// Nothing is owed: the page is what was last written to it, zeros where nothing was.
    Whole,
}

/// What is known of every page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageFacts {
    /// Who may see it.
    pub visibility: Visibility,
    /// Whether its contents are there.
    pub population: Population,
}

// The map reads a leaf's 0 as "ask the 2M page", so 0 is the page there are fewest of: shared, and
// its contents owed.
const PRIVATE: u8 = 0b01;
const WHOLE: u8 = 0b10;
/// Both bits.
pub(super) const FACTS: u8 = PRIVATE | WHOLE;

impl PageFacts {
    pub(super) const fn bits(self) -> u8 {
        let visibility = match self.visibility {
            Visibility::Private => PRIVATE,
            Visibility::Shared => 0,
        };
        match self.population {
            Population::Owed => visibility,
            Population::Whole => visibility | WHOLE,
        }
    }

    #[inline]
    pub(super) const fn from_bits(bits: u8) -> Self {
        Self {
            visibility: if bits & PRIVATE == 0 { Visibility::Shared } else { Visibility::Private },
            population: if bits & WHOLE == 0 { Population::Owed } else { Population::Whole },
        }
    }
}

/// One fact set to one value, the other left as it is.
#[derive(Clone, Copy)]
pub(super) struct Change {
    /// The bit of the fact that is set.
    pub(super) mask: u8,
    /// The value of that bit; 0 outside `mask`.
    pub(super) value: u8,
}

impl Change {
    pub(super) const fn apply(self, bits: u8) -> u8 {
        bits & !self.mask | self.value
    }
}

impl From<PageFacts> for Change {
    fn from(facts: PageFacts) -> Self {
        Self { mask: FACTS, value: facts.bits() }
    }
}

impl From<Visibility> for Change {
    fn from(visibility: Visibility) -> Self {
        let value = if visibility == Visibility::Private { PRIVATE } else { 0 };
        Self { mask: PRIVATE, value }
    }
}

impl From<Population> for Change {
    fn from(population: Population) -> Self {
        let value = if population == Population::Whole { WHOLE } else { 0 };
        Self { mask: WHOLE, value }
    }
}
