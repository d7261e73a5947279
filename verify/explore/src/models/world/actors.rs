//! What the guest, the thread, the pinner and the converter do.

use polder_machine::{Exit, GupFast, GupStep, HostExit, Hva, LockOwner, PinKind, Side, VpnRange};
use polder_units::{Gpa, Level, PAGE_SIZE, PfnRange};

use super::{
    BY_GUEST, BY_HOST, CONVERTER, ModelWorld, PINNER, Stage, THREAD, VCPU, VIEW, gfn, page, range,
    vpn,
};
use crate::models::{Do, Fault};
use crate::system::Violation;

impl ModelWorld {
    pub(super) fn guest(&mut self) -> Result<(), Violation> {
        let writes = self.actors[VCPU].at == 0;
        if let Stage::GuestMap(resolved) = self.actors[VCPU].stage {
            let level = Level::Size4K;
            let mapped = self.machine.tdp_map(&resolved, level, true).is_ok();
            self.say(if mapped { "has the page mapped" } else { "finds that it was invalidated" });
            self.actors[VCPU].stage = Stage::Idle;
            return Ok(());
        }
        let mut vcpu = self.machine.vcpu(self.vcpu).expect("it was added");
        let gpa = Gpa::new(0);
        let outcome = if writes {
            let word = u64::from_le_bytes([BY_GUEST; 8]);
            vcpu.write_u64(gpa, Side::Shared, word).map(|()| None)
        } else {
            vcpu.read_u64(gpa, Side::Shared).map(Some)
        };
        match outcome {
            Ok(None) => {
                self.value = BY_GUEST;
                self.say(format!("writes {BY_GUEST}"));
                self.done(VCPU);
                Ok(())
            }
            Ok(Some(word)) => {
                let [byte, ..] = word.to_le_bytes();
                self.say(format!("reads {byte}"));
                self.done(VCPU);
                self.check_read("the guest", byte)
            }
            Err(Exit::Fault(_)) => {
                self.say("is stopped, and its memory found");
                match self.machine.tdp_resolve(self.vm, gfn()) {
                    Ok(resolved) => self.actors[VCPU].stage = Stage::GuestMap(resolved),
                    Err(_) => self.done(VCPU),
                }
                Ok(())
            }
            Err(exit) => unreachable!("a plain guest: {exit}"),
        }
    }

    fn check_read(&self, who: &str, byte: u8) -> Result<(), Violation> {
        if byte == self.value {
            return Ok(());
        }
        let invariant = if self.value == 0 { "INV-10" } else { "INV-2" };
        Err(Violation::new(invariant, format!("{who} reads {byte}, not {}", self.value)))
    }

    pub(super) fn touch(&mut self) -> Result<(), Violation> {
        let writes = self.actors[THREAD].at == 0;
        let (thread, hva) = (self.thread(), Hva::new(u64::from(VIEW) * PAGE_SIZE));
        let mut word = [0; 8];
        let outcome = if writes {
            self.machine.host_write(thread, hva, &[BY_HOST; 8])
        } else {
            self.machine.host_read(thread, hva, &mut word)
        };
        match outcome {
            Ok(()) => {
                self.done(THREAD);
                if writes {
                    self.say(format!("writes {BY_HOST}"));
                    if !self.model.two_pools || !self.is_private {
                        self.value = BY_HOST;
                    }
                    return Ok(());
                }
                self.say(format!("reads {}", word[0]));
                if self.model.two_pools && self.is_private {
                    return Ok(());
                }
                self.check_read("the host", word[0])
            }
            Err(HostExit::Fault(_)) => {
                self.say("is stopped");
                self.actors[THREAD].stage = Stage::Fault(0);
                Ok(())
            }
            Err(exit) => unreachable!("an unmapped page: {exit}"),
        }
    }

    /// A step of a fault of the thread, or of the pinner's slow path.
    pub(super) fn fault(&mut self, actor: usize, at: u8) -> Result<(), Violation> {
        let by = LockOwner(u32::try_from(actor).unwrap_or(0) + 2);
        let pfn = self.machine.backing(self.shared, page()).ok().flatten().map(|it| it.pfn);
        let pfn = pfn.expect("it was allocated");
        let step = self.model.fault[usize::from(at)];
        match step {
            Fault::TakeLock => self.sharing += 1,
            Fault::DropLock => self.sharing -= 1,
            Fault::Look if self.denied => {
                self.say("looks, and has a SIGBUS");
                self.turned_away |= !self.is_private;
                if self.model.fault[..usize::from(at)].contains(&Fault::TakeLock) {
                    self.sharing -= 1;
                }
                // It may not have it.
                let _ = self.machine.unlock_folio(pfn, by);
                self.done(actor);
                return Ok(());
            }
            Fault::Look => {}
            Fault::LockFolio => self.machine.lock_folio(pfn, by).expect("it waited for it"),
            Fault::UnlockFolio => self.machine.unlock_folio(pfn, by).expect("it is its own"),
            Fault::Map => {
                // The lock is its own: it maps under it.
                let locked = self.machine.unlock_folio(pfn, by).is_ok();
                let _ = self.machine.host_map(self.process, vpn(), Level::Size4K);
                if locked {
                    self.machine.lock_folio(pfn, by).expect("it was its own");
                }
            }
        }
        self.say(format!("faults: {step:?}"));
        let over = usize::from(at) + 1 == self.model.fault.len();
        let pins = actor == PINNER;
        self.actors[actor].stage = match (over, pins) {
            (false, _) => Stage::Fault(at + 1),
            (true, true) => Stage::Slow,
            (true, false) => Stage::Idle,
        };
        Ok(())
    }

    pub(super) fn pin(&mut self) -> Result<(), Violation> {
        let gup = match self.actors[PINNER].stage {
            Stage::Pinned(pin) => {
                self.machine.unpin(pin).expect("it holds the pin");
                self.say("releases the pin");
                self.done(PINNER);
                return Ok(());
            }
            Stage::Slow => {
                let pinned = self.machine.pin_user_pages(
                    self.process,
                    VpnRange::one(vpn()),
                    true,
                    PinKind::LongTerm,
                );
                self.actors[PINNER].stage = match pinned {
                    Ok(pin) => Stage::Pinned(pin),
                    Err(_) => Stage::Fault(0),
                };
                self.say(if pinned.is_ok() {
                    "the slow path pins"
                } else {
                    "the slow path faults"
                });
                return Ok(());
            }
            Stage::Gup(gup) => gup,
            _ => GupFast::new(self.process, vpn(), true, PinKind::LongTerm),
        };
        let stepped = gup.step(&mut self.machine).expect("nobody else releases its pin");
        let (stage, line) = match stepped {
            GupStep::Again(gup) => (Stage::Gup(gup), "GUP-fast goes a step on"),
            GupStep::Pinned(pin) => (Stage::Pinned(pin), "GUP-fast pins"),
            GupStep::Fallback => (Stage::Slow, "GUP-fast gives up"),
        };
        self.actors[PINNER].stage = stage;
        self.say(line);
        Ok(())
    }

    pub(super) fn convert(&mut self, at: u8, back: bool) -> Result<(), Violation> {
        let (steps, failed) = self.steps();
        let steps = if back { failed } else { steps };
        let to_private = self.converts_to_private();
        if usize::from(at) == steps.len() {
            self.say(if back { "has failed" } else { "has converted" });
            let denied = std::mem::take(&mut self.turned_away);
            self.done(3);
            if back && to_private && denied {
                let what = "somebody was denied because of a conversion that failed";
                return Err(Violation::new("INV-4", what));
            }
            return Ok(());
        }
        let step = steps[usize::from(at)];
        self.say(format!("{step:?}"));
        let done = self.take_step(step)?;
        if !done {
            self.say(format!("{step:?}: fails"));
        }
        self.actors[3].stage = match (done, back) {
            (true, false) => Stage::Convert(at + 1),
            (_, true) => Stage::Back(at + 1),
            (false, false) => Stage::Back(0),
        };
        Ok(())
    }

    fn take_step(&mut self, step: Do) -> Result<bool, Violation> {
        let backing = self.machine.backing(self.shared, page()).ok().flatten();
        let pfn = backing.expect("it was allocated").pfn;
        match step {
            Do::TakeLock => self.locked = true,
            Do::DropLock => self.locked = false,
            Do::Deny => self.denied = true,
            Do::Allow => self.denied = false,
            Do::SetPrivate | Do::SetShared => self.set_private(step == Do::SetPrivate),
            Do::UnmapHost => {
                let object = self.shared;
                let zapped = self.machine.zap_object(object, range()).is_ok();
                assert!(zapped && self.machine.flush_object(object, range()).is_ok());
            }
            Do::ZapGuest => {
                let zapped = self.machine.tdp_zap(self.vm, polder_units::GfnRange::one(gfn()));
                assert!(zapped.is_ok(), "the VM is there");
            }
            Do::BeginZap => {
                let gfns = polder_units::GfnRange::one(gfn());
                let begun = self.machine.invalidate_begin(self.vm, gfns);
                let gone = self.machine.tdp_unmap(self.vm, gfns);
                let flushed = self.machine.flush_vm(self.vm, gfns);
                assert!(begun.is_ok() && gone.is_ok() && flushed.is_ok(), "the VM is there");
            }
            Do::EndZap => self.machine.invalidate_end(self.vm).expect("it was begun"),
            Do::LockFolio => self.machine.lock_folio(pfn, CONVERTER).expect("it waited for it"),
            Do::UnlockFolio => self.machine.unlock_folio(pfn, CONVERTER).expect("it is its own"),
            Do::CheckCounts => {
                let counts = self.machine.counts(pfn).expect("it was allocated");
                let frames = PfnRange::new(counts.pfn, self.machine.geometry().pages(counts.level));
                let frames = frames.expect("a folio's frames");
                let mut holders = self.machine.holders_of(frames);
                let transient = holders.next().is_some_and(|it| it.speculative)
                    && holders.all(|it| it.speculative);
                if counts.mapcount == 0 && counts.foreign() > 0 && transient {
                    let what = "a conversion fails because of a reference that nobody keeps";
                    if self.only == "INV-4" {
                        return Err(Violation::new("INV-4", what));
                    }
                }
                return Ok(counts.mapcount == 0 && counts.foreign() == 0);
            }
            Do::Split => {
                if self.machine.lock_folio(pfn, CONVERTER).is_err() {
                    return Ok(false);
                }
                let split = self.machine.split_folio(self.shared, page(), CONVERTER);
                assert!(self.machine.unlock_folio(pfn, CONVERTER).is_ok(), "it is its own");
                return Ok(matches!(split, Ok(_) | Err(polder_machine::Error::TooLarge { .. })));
            }
            Do::Merge => {
                let merged =
                    self.machine.merge_folios(self.shared, page(), Level::Size2M, CONVERTER);
                let _ = merged;
            }
        }
        Ok(true)
    }

    fn set_private(&mut self, private: bool) {
        self.is_private = private;
        if self.model.two_pools {
            // The other memory's bytes are not the page's any more: it is to be zeros.
            self.value = 0;
            let object = if private { self.private } else { self.shared };
            let gone = self.machine.unbind(self.vm, gfn());
            let there = self.machine.bind(self.vm, gfn(), object, range());
            assert!(gone.is_ok() && there.is_ok(), "the slot was there");
        }
    }

    /// What is broken, if it is what this search is about.
    pub(super) fn if_asked(&self, outcome: Result<(), Violation>) -> Result<(), Violation> {
        outcome.or_else(|broken| if broken.invariant == self.only { Err(broken) } else { Ok(()) })
    }
}
