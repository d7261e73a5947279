//! Operations in flight: data inside the engine, an affine handle outside.
//!
//! Inside, an operation is a [`Record`]: what it claims, the whole list of its steps, made before
//! the first one is taken, and how far it has come. Outside, whoever drives it holds an
//! `Operation<S>`, where `S` is the stage it has reached: there is one way from stage to stage,
//! [`Engine::advance`], and it consumes the handle, so the order of a protocol is checked by the
//! compiler. Going back is [`Engine::undo`]: the steps taken, and the one that may have been taken
//! in part, are undone last first.
//!
//! A handle that is dropped on the way (its thread panicked) leaves an *abandoned* operation. The
//! record knows by a flag that it shares with the handle. Whoever meets its claim gets a new
//! handle, to undo it with.

mod record;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicBool, Ordering};

use polder_units::{PageIndex, PageRange};

use self::record::{Ended, Progress};
pub(crate) use self::record::{Program, Record};
use crate::folio::Reshape;
use crate::history::Came;
use crate::plant::Bug;
use crate::turns::Awaited;
use crate::{Contents, Engine, Refusal, Step, View, Visibility, VmId};

/// Names an operation; never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(u64);

/// What an operation is doing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Activity {
    /// Making pages private or shared.
    Conversion {
        /// What they become.
        to: Visibility,
        /// What becomes of their bytes.
        contents: Contents,
        /// The VM whose wish it is; all, where the VMM decided for them.
        by: Option<VmId>,
    },
    /// Filling pages that are owed.
    Population,
    /// Dropping contents.
    Discard,
    /// Merging RMP entries.
    Merge,
    /// Moving pages to other memory.
    Move,
    /// Mapping what is shared for a device.
    Attach,
    /// Taking it away from a device.
    Detach,
}

impl Activity {
    /// Whether it takes pages from who may have pinned them. What is owed or private has no pin.
    pub(crate) fn needs_unpinned(self) -> bool {
        match self {
            Self::Conversion { to, .. } => to == Visibility::Private,
            Self::Discard | Self::Move => true,
            Self::Population | Self::Merge | Self::Attach | Self::Detach => false,
        }
    }
}

impl fmt::Display for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Conversion { to, .. } => write!(f, "conversion to {to}"),
            Self::Population => f.write_str("population"),
            Self::Discard => f.write_str("discard"),
            Self::Merge => f.write_str("merge"),
            Self::Move => f.write_str("move"),
            Self::Attach => f.write_str("device that is being attached"),
            Self::Detach => f.write_str("device that is being detached"),
        }
    }
}

/// How far an operation has come: a marker type for each stage, in the file of its verb.
pub trait Stage {
    /// The stage after it.
    type Next;
    /// Which of the record's stages it is, from 0.
    const INDEX: usize;
}

/// The stage of an operation that is being undone. Its end is [`Engine::finish_undo`].
#[derive(Debug)]
pub enum Undoing {}

/// An operation in flight, at stage `S`. Dropping it abandons the operation.
#[must_use = "dropping it abandons the operation"]
#[derive(Debug)]
pub struct Operation<S> {
    id: OpId,
    lease: Lease,
    stage: PhantomData<fn() -> S>,
}

impl<S> Operation<S> {
    fn new(id: OpId, lease: Lease) -> Self {
        Self { id, lease, stage: PhantomData }
    }

    /// Which operation it is.
    pub fn id(&self) -> OpId {
        self.id
    }

    #[cfg(feature = "explore")]
    pub(crate) fn resumed(id: OpId, abandoned: &Arc<AtomicBool>) -> Self {
        Self::new(id, Lease(Arc::clone(abandoned)))
    }
}

/// The handle's half of the flag by which a record knows that its handle is gone.
#[derive(Debug)]
struct Lease(Arc<AtomicBool>);

impl Drop for Lease {
    fn drop(&mut self) {
        // Pairs with `Record::is_abandoned`: what the thread did before is seen by who undoes it.
        self.0.store(true, Ordering::Release);
    }
}

/// Why something could not begin.
#[derive(Debug)]
pub enum Blocked {
    /// It never can, as things are.
    Refused(Refusal),
    /// An operation is in the way, and is being driven. Wait for it, or report this refusal.
    Busy(Refusal),
    /// An operation is in the way, and nobody drives it. Undo it, then ask again.
    Abandoned(Operation<Undoing>),
}

impl From<Refusal> for Blocked {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Engine {
    /// Starts an operation that claims `claims` and changes `parts`, by the steps of `program`.
    pub(crate) fn begin<S: Stage>(
        &mut self,
        activity: Activity,
        claims: Vec<PageRange>,
        parts: Vec<PageRange>,
        program: Program,
    ) -> Operation<S> {
        let progress = Progress::Forward { program, taken: 0, issued: false };
        let id = OpId(self.next_id());
        let abandoned = Arc::new(AtomicBool::new(false));
        let lease = Lease(Arc::clone(&abandoned));
        if self.closes(activity) {
            claims.iter().for_each(|&claim| self.pins.close(claim));
        }
        let (asked, reshape, why) = (Vec::new(), Reshape::default(), None);
        let unpinned = !activity.needs_unpinned();
        let record = Record {
            id,
            activity,
            claims,
            parts,
            asked,
            reshape,
            progress,
            unpinned,
            why,
            abandoned,
        };
        self.operations.push(record);
        Operation::new(id, lease)
    }

    /// Whether an operation claims a page of `range`.
    pub(crate) fn is_claimed(&self, range: PageRange) -> bool {
        self.operations.iter().any(|record| record.claim_on(range).is_some())
    }

    /// The first page of `range` that an operation claims.
    pub(crate) fn first_claimed(&self, range: PageRange) -> Option<PageIndex> {
        let claims = self.operations.iter().flat_map(|record| &record.claims);
        claims.filter_map(|claim| claim.intersection(range)).map(PageRange::start).min()
    }

    /// Blocks on any operation that claims a page of `range`.
    pub(crate) fn check_claims(&mut self, range: PageRange) -> Result<(), Blocked> {
        let met =
            self.operations.iter_mut().find_map(|record| Some((record.claim_on(range)?, record)));
        let Some((held, record)) = met else { return Ok(()) };
        if record.is_abandoned() && !self.plants.has(Bug::AbandonedForgotten) {
            record.turn_back(self.plants, &self.config);
            self.turns.note_abandoned();
            return Err(Blocked::Abandoned(Operation::new(record.id, record.lease())));
        }
        self.turns.note_held(range, Awaited::Operation);
        Err(Blocked::Busy(Refusal::Busy { range, by: record.activity, held }))
    }

    /// Whether no answer and no copy is in flight on what the operation claims.
    pub fn is_drained<S>(&self, operation: &Operation<S>) -> bool {
        self.plants.has(Bug::NoDrain) || self.record(operation.id).is_drained(&self.in_flight)
    }

    /// The step to take next at this stage, or `None` when the stage is over. Until the next call
    /// of [`Engine::step_taken`] or [`Engine::undo`] the step counts as perhaps taken.
    ///
    /// # Panics
    /// If the operation is not drained, or pins were not looked for ([`Engine::look_for_pins`]): no
    /// mapping may be touched before.
    pub fn next_step<S: Stage>(&mut self, operation: &Operation<S>) -> Option<Step> {
        // With these planted answers are given on what is claimed.
        let planted = [Bug::NoDrain, Bug::OneTableUnclaimed, Bug::DeniedWhileClaimed];
        let planted = planted.into_iter().any(|bug| self.plants.has(bug));
        let record = self.operations.iter_mut().find(|record| record.id == operation.id);
        let record = record.expect("a handle's operation is in flight");
        let drained = planted || record.is_drained(&self.in_flight);
        assert!(drained, "a step was asked for before the range was drained");
        assert!(record.unpinned, "a step was asked for before pins were looked for");
        match &mut record.progress {
            Progress::Forward { program, taken, issued } => {
                let step = (*taken < program.stage_ends[S::INDEX]).then(|| program.steps[*taken]);
                *issued = step.is_some();
                step
            }
            Progress::Back { .. } => unreachable!("its handle would be of another type"),
        }
    }

    /// Notes that the step handed out last was done, and hands out the next one.
    pub fn step_taken<S: Stage>(&mut self, operation: &Operation<S>) -> Option<Step> {
        match &mut self.record_mut(operation.id).progress {
            Progress::Forward { taken, issued: true, .. } => *taken += 1,
            progress => panic!("no step is out: {progress:?}"),
        }
        self.next_step(operation)
    }

    /// Goes on to the next stage, once every step of this one was taken.
    pub fn advance<S: Stage>(&mut self, operation: Operation<S>) -> Operation<S::Next> {
        match &self.record(operation.id).progress {
            Progress::Forward { program, taken, .. } => {
                assert_eq!(*taken, program.stage_ends[S::INDEX], "a stage has steps left");
            }
            Progress::Back { .. } => unreachable!("its handle would be of another type"),
        }
        Operation::new(operation.id, operation.lease)
    }

    /// Turns an operation round, at any stage.
    pub fn undo<S: Stage>(&mut self, operation: Operation<S>) -> Operation<Undoing> {
        let (plants, config) = (self.plants, self.config);
        self.record_mut(operation.id).turn_back(plants, &config);
        Operation::new(operation.id, operation.lease)
    }

    /// Notes what it is that an operation which is being undone failed for.
    pub fn note_reason(&mut self, operation: &Operation<Undoing>, why: Refusal) {
        self.record_mut(operation.id).why = Some(why);
    }

    /// The step to take next on the way back, or `None` when all is undone.
    pub fn next_undo(&self, operation: &Operation<Undoing>) -> Option<Step> {
        match &self.record(operation.id).progress {
            Progress::Back { steps, taken, .. } => steps.get(*taken).copied(),
            Progress::Forward { .. } => unreachable!("its handle would be of another type"),
        }
    }

    /// Notes whether the step of [`Engine::next_undo`] was done. If it was not, its pages are to be
    /// quarantined, which is the next step. What is in quarantine is neither given nor taken by the
    /// steps after that.
    pub fn undo_taken(&mut self, operation: &Operation<Undoing>, done: bool) {
        let config = self.config;
        match &mut self.record_mut(operation.id).progress {
            Progress::Back { steps, taken, quarantined } => {
                let step = steps[*taken];
                *taken += 1;
                if let Step::Quarantine(range) = step {
                    let rest = steps.split_off(*taken);
                    steps.extend(rest.into_iter().flat_map(|step| step.without(range)));
                } else if !done {
                    let range = config.granules(step.range());
                    steps.insert(*taken, Step::Quarantine(range));
                    quarantined.push(range);
                }
            }
            Progress::Forward { .. } => unreachable!("its handle would be of another type"),
        }
    }

    /// Ends an operation that was undone. Returns the pages that had to be quarantined.
    pub fn finish_undo(&mut self, operation: Operation<Undoing>) -> Vec<PageRange> {
        assert_eq!(self.next_undo(&operation), None, "there is more to undo");
        // Markers may have been lifted on the way. They stay in the set: lifting one that isn't
        // there is harmless, forgetting one that is would deny a shared page.
        let mut record = self.end(operation.id);
        if let (Activity::Conversion { to, .. }, true) = (record.activity, self.plants.one_table())
        {
            record.parts.iter().for_each(|&part| self.pages.set_visibility(part, to.other()));
        }
        let Progress::Back { quarantined, .. } = &mut record.progress else {
            unreachable!("its handle would be of another type")
        };
        let quarantined = core::mem::take(quarantined);
        for &range in &quarantined {
            self.quarantine.insert(range);
            self.pins.close(range);
        }
        let came = match quarantined.is_empty() {
            true => Came::Undone(record.why.take()),
            false => Came::Quarantined,
        };
        self.history.note(record.activity, &record.claims, &came);
        quarantined
    }

    /// Ends an operation whose last stage is over. Returns what it was: to be kept until the page
    /// map says what the pages have become.
    pub(crate) fn finish<S>(&mut self, operation: &Operation<S>) -> Ended {
        let record = self.end(operation.id);
        self.history.note(record.activity, &record.claims, &Came::Done);
        record
    }

    /// Notes that a view holds no markers on these pages any more.
    pub(crate) fn forget_markers(&mut self, view: View, parts: &[PageRange]) {
        for &part in parts {
            self.markers[view as usize].remove(part);
        }
    }

    fn end(&mut self, id: OpId) -> Ended {
        let at = self.operations.iter().position(|record| record.id == id);
        let record = self.operations.swap_remove(at.expect("a handle's operation is in flight"));
        let gate = self.closes(record.activity).then(|| self.pins.gate());
        Ended { record, gate }
    }

    /// Whether nobody can pin what an operation claims without asking.
    fn closes(&self, activity: Activity) -> bool {
        activity.needs_unpinned() && !self.plants.has(Bug::PinnedWhileDrained)
    }

    pub(crate) fn record(&self, id: OpId) -> &Record {
        self.operations
            .iter()
            .find(|record| record.id == id)
            .expect("a handle's operation is in flight")
    }

    pub(crate) fn record_mut(&mut self, id: OpId) -> &mut Record {
        self.operations
            .iter_mut()
            .find(|record| record.id == id)
            .expect("a handle's operation is in flight")
    }
}
