//! Writing a scenario.

use polder_units::{ByteSize, PAGE_SIZE};

use super::area::{Area, len};
use super::layout::{Layout, MEMORY_MAX, MEMORY_MIN, VCPUS_MAX};
use super::op::{Op, Outcome, Visibility};
use super::random::Random;
use super::{device, refusal};

/// What decides a scenario.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Config {
    /// Bytes of memory.
    pub memory: u64,
    /// How many vCPUs.
    pub vcpus: u8,
    /// Decides patterns and ranges.
    pub seed: u64,
    /// What the host makes of the guest's conversions.
    pub conversions: Conversions,
    /// Whether there is a device on a virtqueue: not where nothing can point to the memory.
    pub virtqueue: bool,
}

/// What a host makes of a guest's conversions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Conversions {
    /// A page that is converted keeps its contents.
    KeepContents,
    /// A page that is converted becomes zeros; the guest fills it again.
    LoseContents,
    /// All memory is shared for good: none can become private.
    Refused,
}

impl Conversions {
    /// What all memory is at first.
    pub const fn initial(self) -> Visibility {
        match self {
            Self::KeepContents | Self::LoseContents => Visibility::Private,
            Self::Refused => Visibility::Shared,
        }
    }

    /// What a sound request comes to.
    pub const fn outcome(self, to: Visibility) -> Outcome {
        match (self, to) {
            (Self::Refused, Visibility::Private) => Outcome::Unsupported,
            _ => Outcome::Done,
        }
    }
}

/// Why there is no such scenario.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum ScenarioError {
    /// Too little or too much memory.
    #[error("a guest has 16M to 1T of memory, not {}", ByteSize::new(*.memory))]
    Memory {
        /// What was asked for, in bytes.
        memory: u64,
    },
    /// A part of a page.
    #[error("{memory} bytes of memory are no multiple of the page size, 4096")]
    Unaligned {
        /// What was asked for, in bytes.
        memory: u64,
    },
    /// No vCPU, or too many.
    #[error("a guest has 1 to 4 vCPUs, not {vcpus}")]
    Vcpus {
        /// What was asked for.
        vcpus: u32,
    },
}

/// What a guest does: a program for each vCPU, and where its memory lies.
///
/// vCPU 0 goes through everything; vCPU 1 churns private memory until vCPU 0 ends; vCPU 2 and
/// vCPU 3 convert pages of areas of their own meanwhile.
///
/// ```
/// use polder_vmm::scenario::{Config, Conversions, Op, Scenario};
/// let config = Config { memory: 64 << 20, vcpus: 2, seed: 1,
///     conversions: Conversions::KeepContents, virtqueue: true };
/// let scenario = Scenario::generate(&config)?;
/// assert!(scenario.least_checks() > 1000);
/// assert_eq!(scenario.program(1).last(), Some(&Op::Done));
/// # Ok::<(), polder_vmm::scenario::ScenarioError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scenario {
    config: Config,
    layout: Layout,
    programs: Vec<Vec<Op>>,
}

impl Scenario {
    /// The scenario of `config`.
    ///
    /// # Errors
    /// [`ScenarioError`] if the memory is too small, too large or no whole pages, or the number of
    /// vCPUs is not 1 to 4.
    pub fn generate(config: &Config) -> Result<Self, ScenarioError> {
        let Config { memory, vcpus, seed, conversions: how, virtqueue } = *config;
        if !(MEMORY_MIN..=MEMORY_MAX).contains(&memory) {
            return Err(ScenarioError::Memory { memory });
        }
        if !memory.is_multiple_of(PAGE_SIZE) {
            return Err(ScenarioError::Unaligned { memory });
        }
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(ScenarioError::Vcpus { vcpus: vcpus.into() });
        }
        let mut random = Random::new(seed);
        let layout = Layout::new(memory, &mut random);
        let programs = (0..vcpus)
            .map(|vcpu| {
                let mut random = Random::new(random.word());
                match vcpu {
                    0 => everything(&layout, vcpus, (how, virtqueue), &mut random),
                    1 => churn(&layout, &mut random),
                    2 => conversions(&layout, (1, vcpu), how, &mut random),
                    _ => conversions(&layout, (2, vcpu), how, &mut random),
                }
            })
            .collect();
        Ok(Self { config: *config, layout, programs })
    }

    /// What decided it.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Where things lie.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The programs, one for each vCPU in order.
    pub fn programs(&self) -> &[Vec<Op>] {
        &self.programs
    }

    /// The program of a vCPU; empty if there is no such vCPU.
    pub fn program(&self, vcpu: u8) -> &[Op] {
        self.programs.get(usize::from(vcpu)).map_or(&[], Vec::as_slice)
    }

    /// The checks that pass, at least: a churn is counted as one pass, whatever it did.
    pub fn least_checks(&self) -> u64 {
        let counts = |op: &&Op| {
            !matches!(
                op,
                Op::Fill { .. }
                    | Op::Store { .. }
                    | Op::Roam { .. }
                    | Op::SetFlag { .. }
                    | Op::WaitFlag { .. }
                    | Op::Time { .. }
                    | Op::StandStill { .. }
                    | Op::Done
            )
        };
        self.programs.iter().flatten().filter(counts).count() as u64
    }
}

/// vCPU 0.
fn everything(
    layout: &Layout,
    vcpus: u8,
    (how, virtqueue): (Conversions, bool),
    random: &mut Random,
) -> Vec<Op> {
    let mut ops = Vec::new();
    let mut area = Area::new(layout.areas[0], how);
    device::transfers(&mut ops, layout, (how, virtqueue), random);
    refusal::beyond_memory(&mut ops, layout);
    area.story(&mut ops, random);
    refusal::refused(&mut ops, layout, layout.areas[0]);
    area.check(&mut ops);
    area.probe(&mut ops, 0..area.len());
    if let Some(range) = layout.high_area {
        Area::new(range, how).story(&mut ops, random);
        area.check(&mut ops);
    }
    for vcpu in 2..vcpus {
        ops.push(Op::WaitFlag { gpa: layout.done_flag(vcpu) });
    }
    ops.push(Op::SetFlag { gpa: layout.stop_flag() });
    ops.push(Op::Done);
    ops
}

/// vCPU 1.
fn churn(layout: &Layout, random: &mut Random) -> Vec<Op> {
    let (gpa, len) = (layout.churn.start().gpa(), len(layout.churn));
    let until = layout.stop_flag();
    vec![Op::Churn { gpa, len, seed: random.word(), until }, Op::Done]
}

/// vCPU 2 and vCPU 3.
fn conversions(
    layout: &Layout,
    (area, vcpu): (usize, u8),
    how: Conversions,
    random: &mut Random,
) -> Vec<Op> {
    let mut ops = Vec::new();
    Area::new(layout.areas[area], how).story(&mut ops, random);
    ops.push(Op::SetFlag { gpa: layout.done_flag(vcpu) });
    ops.push(Op::Done);
    ops
}
