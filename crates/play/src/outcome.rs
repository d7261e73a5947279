//! What a step comes to, and whether that is what was expected.

use std::error::Error as _;

use polder::machine::{
    AccessCheck, Discrepancy, Exit, FirmwareFail, HostExit, PkvmFail, Refused, RmpFail,
};
use polder::units::PAGE_SIZE;
use polder::{Error, GuestExit, MemoryFault, Refusal};

use crate::names::Is;
use crate::scenario::{Expect, Hold, Verb};

/// What a step came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// In a word.
    pub is: Is,
    /// In a sentence; empty where the word says it all.
    pub text: String,
    /// The page that it names.
    pub page: Option<u64>,
    /// The holder that it names.
    pub holder: Option<String>,
    /// The error code, by Linux's name.
    pub errno: Option<String>,
    /// What was read.
    pub bytes: Option<Vec<u8>>,
    /// How many pages were converted.
    pub converted: Option<u64>,
    /// How many pages a prefault did, how many of these it left out, and how many are left.
    pub prefaulted: Option<[u64; 3]>,
}

impl Outcome {
    pub(crate) fn new(is: Is, text: impl Into<String>) -> Self {
        let text = text.into();
        let (page, holder, errno, bytes) = Default::default();
        Self { is, text, page, holder, errno, bytes, converted: None, prefaulted: None }
    }

    pub(crate) fn done() -> Self {
        Self::new(Is::Ok, "")
    }

    pub(crate) fn read(bytes: Vec<u8>) -> Self {
        Self { bytes: Some(bytes), ..Self::done() }
    }

    /// What it comes to in a line.
    pub fn line(&self) -> String {
        let mut line = self.is.to_string();
        if let Some(pages) = self.converted {
            line += &format!(": {pages} converted");
        }
        if let Some([done, skipped, left]) = self.prefaulted {
            line += &format!(": {done} done, {skipped} of them left out, {left} left");
        }
        if let Some(bytes) = &self.bytes {
            line += &format!(": {}", shown(bytes));
        }
        if !self.text.is_empty() {
            line += &format!(": {}", self.text);
        }
        line
    }

    /// Why it is not what was expected.
    pub(crate) fn unmet(&self, expect: &Expect, verb: &Verb, hold: Option<Hold>) -> Option<String> {
        let held = hold.is_some() || matches!(verb, Verb::Resume { hold: Some(_) });
        let is = expect.is.unwrap_or(if held { Is::Held } else { Is::Ok });
        if self.is != is {
            return Some(format!("\"{is}\" was expected"));
        }
        let differs = |what: &str, expected: &Option<String>, found: &Option<String>| {
            let expected = expected.as_ref().filter(|_| expected != found)?;
            let found = found.as_deref().unwrap_or("none");
            Some(format!("{what} {expected} was expected, not {found}"))
        };
        let number = |number: Option<u64>| number.map(|number| number.to_string());
        differs("page", &number(expect.page), &number(self.page))
            .or_else(|| differs("holder", &expect.holder, &self.holder))
            .or_else(|| differs("the error", &expect.errno, &self.errno))
            .or_else(|| {
                differs("so many pages:", &number(expect.converted), &number(self.converted))
            })
            .or_else(|| {
                let prefaulted = |at: usize| number(self.prefaulted.map(|counts| counts[at]));
                differs("done:", &number(expect.done), &prefaulted(0))
                    .or_else(|| differs("left out:", &number(expect.skipped), &prefaulted(1)))
                    .or_else(|| differs("left:", &number(expect.left), &prefaulted(2)))
            })
            .or_else(|| self.unmet_bytes(expect))
            .or_else(|| {
                let says =
                    expect.says.as_ref().filter(|says| !self.text.contains(says.as_str()))?;
                Some(format!("it was expected to say \"{says}\""))
            })
    }

    fn unmet_bytes(&self, expect: &Expect) -> Option<String> {
        let bytes = self.bytes.as_deref().unwrap_or_default();
        let begins = |text: &String| {
            bytes.starts_with(&text.as_bytes()[..text.len().min(bytes.len())]) && !bytes.is_empty()
        };
        if let Some(text) = expect.bytes.as_ref().filter(|text| !begins(text)) {
            return Some(format!("{} was expected", shown(text.as_bytes())));
        }
        if let Some(text) = expect.not.as_ref().filter(|text| begins(text)) {
            return Some(format!("anything but {} was expected", shown(text.as_bytes())));
        }
        let zeros = !bytes.is_empty() && bytes.iter().all(|byte| *byte == 0);
        (expect.zeros && !zeros).then(|| "zeros were expected".to_owned())
    }
}

/// Bytes as a text, as far as they are one, without the zeros behind it.
fn shown(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    if end == 0 {
        return "zeros".to_owned();
    }
    let bytes = &bytes[..end.min(64)];
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => format!("\"{text}\""),
        _ => bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect(),
    }
}

/// A step that came to something else than its end. (A box, for it is returned through all calls.)
#[derive(Debug)]
pub(crate) struct Stop(pub(crate) Box<Outcome>);

impl Stop {
    pub(crate) fn new(is: Is, text: impl Into<String>) -> Self {
        Self(Box::new(Outcome::new(is, text)))
    }
}

impl<E: Into<Outcome>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self(Box::new(error.into()))
    }
}

fn refusal(refusal: &Refusal) -> (Is, Option<u64>, Option<String>) {
    let on = |is, page: &polder::units::PageIndex| (is, Some(page.get()), None);
    match refusal {
        Refusal::Range(_) => (Is::Range, None, None),
        Refusal::Beyond { .. } => (Is::Beyond, None, None),
        Refusal::Unbound { .. } | Refusal::NoSlot { .. } => (Is::Unbound, None, None),
        Refusal::Busy { .. } | Refusal::Awaited { .. } => (Is::Busy, None, None),
        Refusal::Pinned { page, holder, .. } => {
            (Is::Pinned, Some(page.get()), Some(holder.to_string()))
        }
        Refusal::Referenced { page, holder, .. } => {
            (Is::Referenced, Some(page.get()), Some(holder.to_string()))
        }
        Refusal::Private { page } => on(Is::Private, page),
        Refusal::Owed { page } => on(Is::Owed, page),
        Refusal::SourceFailed { page } => on(Is::SourceFailed, page),
        Refusal::Whole { page } => on(Is::Whole, page),
        Refusal::Quarantined { page } => on(Is::Quarantined, page),
        Refusal::GuestDecides { page, .. } => on(Is::NotAsked, page),
        Refusal::Launched { page } => on(Is::Launched, page),
        Refusal::Unmovable { page, .. } => on(Is::Unmovable, page),
        Refusal::Contents { .. } => (Is::Contents, None, None),
        Refusal::SlotTaken { .. } => (Is::SlotTaken, None, None),
        Refusal::GfnsTaken { .. } => (Is::GfnsTaken, None, None),
        Refusal::PagesTaken { .. } => (Is::PagesTaken, None, None),
        Refusal::NoSuchSlot { .. } => (Is::NoSuchSlot, None, None),
        _ => (Is::Failed, None, None),
    }
}

impl From<Error> for Outcome {
    fn from(error: Error) -> Self {
        let causes = std::iter::successors(error.source(), |&cause| cause.source());
        let text = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
        let (is, page, holder) = match &error {
            Error::Refused(refused) => refusal(refused),
            Error::Copy(touched) => (Is::Denied, Some(touched.offset / PAGE_SIZE), None),
            Error::Quarantined { .. } => (Is::Quarantined, None, None),
            Error::Machine(error) => (Self::from(*error).is, None, None),
            Error::Rmp { page, fail } => (Self::from(*fail).is, Some(page.get()), None),
            Error::Pkvm { page, fail } => (Self::from(*fail).is, Some(page.get()), None),
            Error::Firmware { page, .. } => (Is::Failed, Some(page.get()), None),
            Error::NotOffered { .. }
            | Error::Missing { .. }
            | Error::OneVm { .. }
            | Error::OtherRoot { .. } => (Is::NotOffered, None, None),
            Error::HugePages { .. } => (Is::NoMemory, None, None),
            Error::Host(_) if error.errno() == polder::Errno::ENOMEM => (Is::NoMemory, None, None),
            _ => (Is::Failed, None, None),
        };
        let errno = Some(format!("{:?}", error.errno()));
        Self { page, holder, errno, ..Self::new(is, text) }
    }
}

impl From<MemoryFault> for Outcome {
    fn from(fault: MemoryFault) -> Self {
        let is = match fault {
            MemoryFault::Unbound(_) => Is::Unbound,
            MemoryFault::Mismatch { .. } => Is::Mismatch,
            MemoryFault::Quarantined(_) => Is::Quarantined,
            MemoryFault::SourceFailed(_) => Is::SourceFailed,
        };
        Self::new(is, fault.to_string())
    }
}

impl From<GuestExit> for Outcome {
    fn from(exit: GuestExit) -> Self {
        let text = exit.to_string();
        match exit {
            GuestExit::MemoryFault(fault) => fault.into(),
            GuestExit::NotValidated(_) => Self::new(Is::NotValidated, text),
            GuestExit::PageFault(_) => Self::new(Is::PageFault, text),
            GuestExit::Userfault(_) => Self::new(Is::Failed, text),
            GuestExit::Kicked => Self::new(Is::Kicked, text),
            GuestExit::Failed(error) => error.into(),
        }
    }
}

impl From<Refused> for Outcome {
    fn from(refused: Refused) -> Self {
        let is = match refused.check {
            AccessCheck::InUse => Is::RmpInUse,
            AccessCheck::HypervisorOwned => Is::HypervisorOwned,
            AccessCheck::GuestOwned => Is::GuestOwned,
            AccessCheck::ReverseMap => Is::ReverseMap,
            AccessCheck::Mutable => Is::Immutable,
            AccessCheck::PageSize => Is::PageSize,
            AccessCheck::InstructionSize => Is::InstructionSize,
            AccessCheck::Validated => Is::NotValidated,
            AccessCheck::Vmsa => Is::Failed,
            AccessCheck::HostStage2 => Is::HostAbort,
            AccessCheck::Iommu => Is::Iommu,
            AccessCheck::DirectMap => Is::NoDirectMap,
        };
        Self::new(is, refused.to_string())
    }
}

impl From<RmpFail> for Outcome {
    fn from(fail: RmpFail) -> Self {
        let is = match fail {
            RmpFail::Undefined => Is::Undefined,
            RmpFail::Input => Is::FailInput,
            RmpFail::Permission => Is::FailPermission,
            RmpFail::InUse => Is::FailInUse,
            RmpFail::Overlap => Is::FailOverlap,
            RmpFail::SizeMismatch => Is::FailSizeMismatch,
            RmpFail::BadAddress => Is::FailBadAddress,
        };
        Self::new(is, fail.to_string())
    }
}

impl From<PkvmFail> for Outcome {
    fn from(fail: PkvmFail) -> Self {
        let is = match fail {
            PkvmFail::Undefined => Is::Undefined,
            PkvmFail::Permission => Is::Eperm,
            PkvmFail::NotFound => Is::Enoent,
            PkvmFail::Busy => Is::Ebusy,
            PkvmFail::NoMemory => Is::Enomem,
            PkvmFail::NotAsked => Is::NotAsked,
            PkvmFail::Input => Is::FailInput,
        };
        Self::new(is, fail.to_string())
    }
}

impl From<FirmwareFail> for Outcome {
    fn from(fail: FirmwareFail) -> Self {
        Self::new(Is::Firmware, fail.to_string())
    }
}

impl From<Exit> for Outcome {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Fault(_) => Self::new(Is::Stage2Fault, exit.to_string()),
            Exit::Refused(refused) => refused.into(),
            Exit::PageFault(_) | Exit::Intercept(_) | Exit::Request(_) | Exit::Halted => {
                Self::new(Is::Failed, exit.to_string())
            }
        }
    }
}

impl From<HostExit> for Outcome {
    fn from(exit: HostExit) -> Self {
        let is = match exit {
            HostExit::Fault(_) => Is::NotPinned,
            HostExit::Wait { .. } => Is::Locked,
            HostExit::Sigbus { .. } | HostExit::Segv { .. } => Is::Denied,
            HostExit::Pinned { .. } => Is::Pinned,
            HostExit::Refused(refused) => return refused.into(),
            HostExit::Invalid(error) => return error.into(),
        };
        Self::new(is, exit.to_string())
    }
}

impl From<polder::machine::Error> for Outcome {
    fn from(error: polder::machine::Error) -> Self {
        use polder::machine::Error as Machine;
        let is = match error {
            Machine::Refused(refused) => return refused.into(),
            Machine::Locked { .. } => Is::Locked,
            Machine::NotLocked { .. } => Is::NotLocked,
            Machine::Mapped { .. } => Is::Mapped,
            Machine::Referenced { .. } => Is::Referenced,
            Machine::Hole { .. } => Is::Hole,
            Machine::Exists { .. } => Is::Exists,
            Machine::Misaligned { .. } => Is::Misaligned,
            Machine::Scattered { .. } => Is::Scattered,
            Machine::TooLarge { .. } => Is::TooLarge,
            Machine::Stale { .. } => Is::Stale,
            Machine::NoMemory { .. } => Is::NoMemory,
            Machine::NoSlot { .. } => Is::Unbound,
            Machine::Beyond { .. } | Machine::OutOfBounds { .. } => Is::Beyond,
            Machine::NoSnp | Machine::NoPkvm | Machine::Protected { .. } => Is::Undefined,
            Machine::Pkvm(fail) => return fail.into(),
            Machine::Iommu(_) => Is::Iommu,
            _ => Is::Failed,
        };
        Self::new(is, error.to_string())
    }
}

impl From<Discrepancy> for Outcome {
    fn from(found: Discrepancy) -> Self {
        Self::new(Is::Discrepancy, found.to_string())
    }
}
