//! Where things lie in the guest's memory.
//!
//! ```text
//! 0     2M      2M+68K 2M+76K    3M-4K   3M      4M         8M         12M       16M
//! | boot | bounce | queue | unused | flags | churn | area v0 | area v2 | area v3 | untouched ...
//!
//! ... 3G [MMIO hole] 4G ... | second area of v0 | ...   where memory is larger than 3G + 4M
//! ```

use polder_units::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageCount};

use super::random::Random;

/// The least memory a scenario fits in: 16 MiB, for any number of vCPUs.
pub const MEMORY_MIN: u64 = 16 << 20;
/// The most: 1 TiB.
pub const MEMORY_MAX: u64 = 1 << 40;
/// Where the hole for devices starts; memory beyond 3 GiB continues at [`MMIO_END`].
pub const MMIO_START: u64 = 3 << 30;
/// Where the hole for devices ends: 4 GiB.
pub const MMIO_END: u64 = 4 << 30;
/// Where the boot structures end, which begin at 0: tables, code, stacks and ops. 2 MiB.
pub const BOOT_END: u64 = 2 << 20;
/// The most vCPUs.
pub const VCPUS_MAX: u8 = 4;

const AREA: u64 = 4 << 20;
const FLAGS: u64 = (3 << 20) - PAGE_SIZE;
const CHURN: u64 = 3 << 20;
const CHURN_LEN: u64 = 256 << 10;

/// Pages of the device's payload, and of its answer.
const BUFFER_PAGES: u64 = 8;

/// The guest-physical ranges of `memory` bytes (multiples of 4 KiB; a rest is left out): below the
/// hole, and above it.
pub fn ram(memory: u64) -> [Option<GfnRange>; 2] {
    let low = memory.min(MMIO_START);
    let high = MMIO_END.checked_add(memory - low);
    [
        GfnRange::between(0, low / PAGE_SIZE),
        high.and_then(|end| GfnRange::between(MMIO_END / PAGE_SIZE, end / PAGE_SIZE)),
    ]
}

/// Where things lie.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    memory: u64,
    /// Tables, code, stacks and ops: private for good, but on host `guest_memfd`, where they are
    /// shared.
    pub boot: GfnRange,
    /// The device's request page.
    pub request: GfnRange,
    /// The device's payload.
    pub payload: GfnRange,
    /// The device's answer.
    pub response: GfnRange,
    /// The device's virtqueue: descriptors and available ring, and on its own page the used ring.
    pub queue: GfnRange,
    /// The page of flags: private for good.
    pub flags: GfnRange,
    /// What vCPU 1 churns: private for good.
    pub churn: GfnRange,
    /// The area of vCPU 0, vCPU 2 and vCPU 3, below the hole.
    pub areas: [GfnRange; 3],
    /// The second area of vCPU 0, above the hole, where there is memory for it.
    pub high_area: Option<GfnRange>,
}

impl Layout {
    /// The layout of `memory` bytes, which the caller has checked; `random` picks the high area.
    pub(super) fn new(memory: u64, random: &mut Random) -> Self {
        let bounce = |page, count| range(BOOT_END + page * PAGE_SIZE, count * PAGE_SIZE);
        let slots = memory.saturating_sub(MMIO_START) / AREA;
        Self {
            memory,
            boot: range(0, BOOT_END),
            request: bounce(0, 1),
            payload: bounce(1, BUFFER_PAGES),
            response: bounce(1 + BUFFER_PAGES, BUFFER_PAGES),
            queue: bounce(1 + 2 * BUFFER_PAGES, 2),
            flags: range(FLAGS, PAGE_SIZE),
            churn: range(CHURN, CHURN_LEN),
            areas: [1, 2, 3].map(|slot| range(slot * AREA, AREA)),
            high_area: (slots > 0).then(|| range(MMIO_END + random.below(slots) * AREA, AREA)),
        }
    }

    /// The bytes of memory.
    pub const fn memory(&self) -> u64 {
        self.memory
    }

    /// The address after memory's last byte.
    pub const fn end(&self) -> Gpa {
        let above = self.memory.saturating_sub(MMIO_START);
        Gpa::new(if above == 0 { self.memory } else { MMIO_END + above })
    }

    /// The flag that ends the churn.
    pub fn stop_flag(&self) -> Gpa {
        self.flags.start().gpa()
    }

    /// The flag that vCPU `vcpu` sets when its area is done with; each on a line of its own.
    pub fn done_flag(&self, vcpu: u8) -> Gpa {
        Gpa::new(self.flags.start().gpa().get() + 64 + 64 * u64::from(vcpu))
    }
}

/// The pages of `len` bytes at `start`, both multiples of 4 KiB and far below 2^64.
fn range(start: u64, len: u64) -> GfnRange {
    let whole = GfnRange::between(start / PAGE_SIZE, (start + len) / PAGE_SIZE);
    whole.unwrap_or_else(|| GfnRange::one(Gfn::from(0)))
}

/// The bytes of `count` pages.
pub(super) const fn bytes(count: PageCount) -> u64 {
    count.get() * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_continues_above_the_hole() {
        assert_eq!(ram(64 << 20), [GfnRange::between(0, 16 << 10), None]);
        assert_eq!(ram(3 << 30)[1], None);
        let [low, high] = ram(8 << 30);
        assert_eq!(low, GfnRange::between(0, 3 << 18));
        assert_eq!(high, GfnRange::between(4 << 18, 9 << 18));
    }

    #[test]
    fn nothing_overlaps() {
        let layout = Layout::new(8 << 30, &mut Random::new(1));
        let [a, b, c] = layout.areas;
        let Layout { boot, request, payload, response, queue, flags, churn, .. } = layout;
        let high = layout.high_area.unwrap();
        let all = [boot, request, payload, response, queue, flags, churn, a, b, c, high];
        for (i, x) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|y| !x.overlaps(*y)), "{x}");
            assert!(ram(8 << 30).into_iter().flatten().any(|ram| ram.contains_range(*x)), "{x}");
        }
        assert_eq!(layout.end(), Gpa::new(9 << 30));
    }
}
