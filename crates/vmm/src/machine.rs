//! A vCPU of the simulated machine: interprets the ops that KVM's guest runs as machine code.
//!
//! Every load and store of an op goes through the vCPU's TLB and stage 2, a page at a time.
//! Requests are parsed from the same numbers as a guest's registers.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use polder::units::{Gpa, PAGE_BYTES, PAGE_SIZE};
use polder::{GuestExit, MemoryFault, Visibility};

use crate::RunError;
use crate::accesses::{self, Accesses, Changed};
use crate::guest::{
    DeviceRequest, KVM_HC_MAP_GPA_RANGE, MAP_GPA_RANGE_ENCRYPTED, Program, Request, STATUS_OFFSET,
    number,
};
use crate::report::Failure;
use crate::requests::{Next, Requests};
use crate::scenario::{HostAccess, Op, Outcome, Pattern, WORD, digest};
use crate::vcpu::{FAULTS_KEPT, Ran, page_at};

/// What ends a program early.
enum Stop {
    Failed(Failure),
    Fault(MemoryFault),
    Kicked,
    Error(RunError),
}

impl From<GuestExit> for Stop {
    fn from(exit: GuestExit) -> Self {
        match exit {
            GuestExit::Kicked => Self::Kicked,
            GuestExit::Failed(error) => Self::Error(RunError::Memory(error)),
            GuestExit::MemoryFault(fault) => Self::Fault(fault),
            GuestExit::PageFault(fault) => unreachable!("its tables map all of memory: {fault:?}"),
            GuestExit::NotValidated(_) => unreachable!("the guest accepts what it is given"),
            GuestExit::Userfault(_) => unreachable!("it is answered where it is made"),
        }
    }
}

/// A vCPU and its program.
pub(crate) struct Interpreter<'a> {
    index: u32,
    memory: Accesses<'a>,
    program: Program,
    ops: &'a [Op],
    requests: &'a Requests<'a>,
    handled: &'a AtomicU64,
    stop: &'a AtomicBool,
    /// Accesses that memory did not let through.
    faults: RefCell<Vec<MemoryFault>>,
}

impl<'a> Interpreter<'a> {
    pub(crate) fn new(
        (index, memory): (u32, Accesses<'a>),
        (program, ops): (Program, &'a [Op]),
        requests: &'a Requests<'a>,
        handled: &'a AtomicU64,
        stop: &'a AtomicBool,
    ) -> Self {
        let faults = RefCell::default();
        Self { index, memory, program, ops, requests, handled, stop, faults }
    }

    /// Runs the program to its end, until it fails, or until `stop` is set (and it is kicked).
    pub(crate) fn run(self) -> Result<Ran, RunError> {
        let mut checks_passed = 0;
        let stop = match self.program {
            Program::SelfTest => self.self_test(&mut checks_passed),
            Program::TripleFault => {
                Err(Stop::Failed(Failure::TripleFault { vcpu: self.index, changed: None }))
            }
            Program::Spin => self.spin(),
            Program::Flood => self.flood(),
        };
        let failure = match stop {
            Ok(()) | Err(Stop::Kicked) => None,
            Err(Stop::Failed(failure)) => Some(failure),
            Err(Stop::Fault(fault)) => Some(Failure::MemoryFault { vcpu: self.index, fault }),
            Err(Stop::Error(error)) => return Err(error),
        };
        Ok(Ran { checks_passed, failure, faults: self.faults.into_inner() })
    }

    fn self_test(&self, checks_passed: &mut u64) -> Result<(), Stop> {
        for (index, op) in (0..).zip(self.ops) {
            match self.op(index, op) {
                Ok(passed) => *checks_passed += passed,
                Err(Stop::Fault(fault)) if self.machine_check(fault) => {}
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }

    /// Has the guest take a machine check for a page that has failed, if that is wished. It leaves
    /// the op that it was at.
    fn machine_check(&self, fault: MemoryFault) -> bool {
        let MemoryFault::SourceFailed(gfns) = fault else { return false };
        let (memory, vm) = self.requests.memory();
        let gpa = gfns.start().gpa();
        let Some((checks, page)) = self.requests.machine_checks().zip(page_at(memory, vm, gpa))
        else {
            return false;
        };
        checks.give(self.index, page, gpa);
        self.handled.fetch_add(1, Ordering::Relaxed);
        let arguments = [gpa.get(), 0, 0, 0, 0];
        let told =
            self.requests.answer(self.index, Request::parse(number::MACHINE_CHECK, arguments));
        told == Next::Answer(0)
    }

    /// Does one op; returns how many checks it passed.
    fn op(&self, index: u64, op: &Op) -> Result<u64, Stop> {
        self.go_on()?;
        match *op {
            Op::Fill { gpa, len, pattern } => self.fill(gpa, len, pattern).map(|()| 0),
            Op::Check { gpa, len, pattern } => self.check(index, gpa, len, pattern).map(|()| 1),
            Op::Convert { gpa, pages, to, expect } => self.convert(index, (gpa, pages), to, expect),
            Op::TimeConvert { gpa, pages, to, log } => {
                let done = self.convert(index, (gpa, pages), to, Outcome::Done)?;
                self.store(log, 0)?;
                Ok(done)
            }
            Op::Device { request, id, source, len, destination, expect } => {
                let device = DeviceRequest { id, source, len, destination };
                let found = self.device(request, &device)?;
                self.compare(index, request, i64::from(expect.code()).cast_unsigned(), found)
            }
            Op::Notify { queue, size, expect } => {
                let answer = self.request(number::NOTIFY, [queue.get(), size, 0, 0, 0])?;
                self.compare(index, queue, i64::from(expect.code()).cast_unsigned(), answer)
            }
            Op::Probe { gpa, pages, expect } => {
                let readable = u64::from(expect == HostAccess::Readable);
                let answer = self.request(number::PROBE, [gpa.get(), pages, readable, 0, 0])?;
                self.compare(index, gpa, 0, answer)
            }
            Op::Load { gpa, expect } => {
                let found = self.load(gpa)?;
                self.compare(index, gpa, expect, found)
            }
            Op::Store { gpa, value } => self.store(gpa, value).map(|()| 0),
            Op::Churn { gpa, len, seed, until } => self.churn(index, (gpa, len), seed, until),
            Op::Roam { gpa, len, count, seed } => self.roam((gpa, len), count, seed).map(|()| 0),
            Op::SetFlag { gpa } => self.store(gpa, 1).map(|()| 0),
            Op::WaitFlag { gpa } => {
                while self.load(gpa)? == 0 {
                    self.go_on()?;
                    std::thread::yield_now();
                }
                Ok(0)
            }
            Op::Time { gpa, pages, log } => self.time(gpa, pages, log).map(|()| 0),
            Op::StandStill { gpa, pages, log, until } => {
                while self.load(until)? == 0 {
                    self.go_on()?;
                    for page in 0..pages {
                        self.load(Gpa::new(gpa.get() + page * PAGE_SIZE))?;
                        self.store(log, self.load(log)?.wrapping_add(1))?;
                    }
                    std::thread::yield_now();
                }
                Ok(0)
            }
            Op::Digest { gpa, len } => self.digest(index, gpa, len),
            Op::Done => Ok(0),
        }
    }

    fn convert(
        &self,
        index: u64,
        (gpa, pages): (Gpa, u64),
        to: Visibility,
        expect: Outcome,
    ) -> Result<u64, Stop> {
        let private = if to == Visibility::Private { MAP_GPA_RANGE_ENCRYPTED } else { 0 };
        // What it gives away it no longer accepts (AMD APM volume 2, 15.36.6).
        let frames = accesses::frames(gpa, pages).filter(|_| private == 0);
        let rescinded = frames.map(|frames| self.memory.rescind(frames)).transpose()?;
        let asked = accesses::frames(gpa, pages)
            .map(|frames| self.memory.convert(frames, to))
            .transpose()?;
        let answer = match asked.flatten() {
            Some(answer) => {
                self.handled.fetch_add(1, Ordering::Relaxed);
                answer.cast_unsigned()
            }
            None => self.request(KVM_HC_MAP_GPA_RANGE, [gpa.get(), pages, private, 0, 0])?,
        };
        if let (Some(rescinded), true) = (rescinded, answer != 0)
            && let Some(Changed { gpa, held, found }) = self.memory.keep(&rescinded)?
        {
            // What was refused has changed nothing (INV-4); here it did.
            self.compare(index, gpa, held, found.unwrap_or(!held))?;
        }
        self.compare(index, gpa, i64::from(expect.code()).cast_unsigned(), answer)
    }

    fn roam(&self, (gpa, len): (Gpa, u64), count: u64, mut seed: u64) -> Result<(), Stop> {
        for _ in 0..count {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            self.go_on()?;
            self.load(Gpa::new(gpa.get() + (seed & crate::guest::mask(len))))?;
        }
        Ok(())
    }

    /// Reads pages; there is no clock to time it by.
    fn time(&self, gpa: Gpa, pages: u64, log: Gpa) -> Result<(), Stop> {
        for page in 0..pages {
            self.load(Gpa::new(gpa.get() + page * PAGE_SIZE))?;
            self.store(Gpa::new(log.get() + page * WORD), 0)?;
        }
        Ok(())
    }

    fn churn(
        &self,
        index: u64,
        (gpa, len): (Gpa, u64),
        seed: u64,
        until: Gpa,
    ) -> Result<u64, Stop> {
        for pass in 0.. {
            self.go_on()?;
            let pattern = Pattern::Seeded { seed: seed.wrapping_add(pass) };
            self.fill(gpa, len, pattern)?;
            self.check(index, gpa, len, pattern)?;
            if self.load(until)? != 0 {
                return Ok(pass + 1);
            }
        }
        Ok(0)
    }

    fn spin(&self) -> Result<(), Stop> {
        loop {
            self.go_on()?;
            std::thread::yield_now();
        }
    }

    fn flood(&self) -> Result<(), Stop> {
        let mut word = 1u64;
        loop {
            self.go_on()?;
            // An xorshift: anything, the same each time.
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            let number =
                [KVM_HC_MAP_GPA_RANGE, number::PROBE, number::DOORBELL, word][(word % 4) as usize];
            self.request(number, [word, word >> 3, word & 0x1f, word, word])?;
        }
    }

    fn go_on(&self) -> Result<(), Stop> {
        if self.stop.load(Ordering::Acquire) { Err(Stop::Kicked) } else { Ok(()) }
    }

    /// Makes a request; returns its answer, sign-extended.
    fn request(&self, number: u64, arguments: [u64; 5]) -> Result<u64, Stop> {
        self.handled.fetch_add(1, Ordering::Relaxed);
        match self.requests.answer(self.index, Request::parse(number, arguments)) {
            Next::Answer(answer) => Ok(answer.cast_unsigned()),
            // A flood may hit upon these numbers by chance.
            Next::Done { .. } | Next::Failed { .. } => Ok(0),
        }
    }

    fn device(&self, request: Gpa, device: &DeviceRequest) -> Result<u64, Stop> {
        let words = device.words().map(u64::to_le_bytes).concat();
        self.memory.write(request, &words)?;
        match self.request(number::DOORBELL, [request.get(), 0, 0, 0, 0])? {
            0 => self.load(Gpa::new(request.get().saturating_add(STATUS_OFFSET))),
            refused => Ok(refused),
        }
    }

    fn compare(&self, op: u64, gpa: Gpa, expected: u64, found: u64) -> Result<u64, Stop> {
        if found == expected {
            return Ok(1);
        }
        Err(Stop::Failed(Failure::Check { vcpu: self.index, op, gpa, expected, found }))
    }

    fn fill(&self, gpa: Gpa, len: u64, pattern: Pattern) -> Result<(), Stop> {
        let mut bytes = [0; PAGE_BYTES];
        for (at, count) in pages(gpa, len) {
            for (word, bytes) in words(at).zip(bytes[..count].chunks_exact_mut(8)) {
                bytes.copy_from_slice(&pattern.word(word).to_le_bytes());
            }
            self.memory.write(at, &bytes[..count])?;
        }
        Ok(())
    }

    fn check(&self, op: u64, gpa: Gpa, len: u64, pattern: Pattern) -> Result<(), Stop> {
        let mut bytes = [0; PAGE_BYTES];
        for (at, count) in pages(gpa, len) {
            self.memory.read(at, &mut bytes[..count])?;
            for (word, bytes) in words(at).zip(bytes[..count].chunks_exact(8)) {
                let found = u64::from_le_bytes(bytes.try_into().expect("a chunk of 8 bytes"));
                self.compare(op, word, pattern.word(word), found)?;
            }
        }
        Ok(())
    }

    fn digest(&self, op: u64, gpa: Gpa, len: u64) -> Result<u64, Stop> {
        let mut all = Vec::new();
        let mut bytes = [0; PAGE_BYTES];
        for (at, count) in pages(gpa, len) {
            self.go_on()?;
            self.memory.read(at, &mut bytes[..count])?;
            let words = bytes[..count].chunks_exact(8);
            all.extend(words.map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))));
        }
        let arguments = [gpa.get(), len, digest(all), op, 0];
        self.handled.fetch_add(1, Ordering::Relaxed);
        match self.requests.answer(self.index, Request::parse(number::DIGEST, arguments)) {
            Next::Failed { failure, .. } => Err(Stop::Failed(failure)),
            Next::Answer(answer) => self.compare(op, gpa, 0, answer.cast_unsigned()),
            Next::Done { .. } => unreachable!("a digest ends no program"),
        }
    }

    /// A load; where there is no memory it gives all ones.
    fn load(&self, gpa: Gpa) -> Result<u64, Stop> {
        let mut bytes = [0xff; 8];
        self.bus(self.memory.read(gpa, &mut bytes))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A store; where there is no memory it is dropped.
    fn store(&self, gpa: Gpa, value: u64) -> Result<(), Stop> {
        self.bus(self.memory.write(gpa, &value.to_le_bytes()))
    }

    /// Lets an access that memory did not let through go by, and remembers it.
    fn bus(&self, access: Result<(), GuestExit>) -> Result<(), Stop> {
        let Err(GuestExit::MemoryFault(fault @ MemoryFault::Unbound(_))) = access else {
            return Ok(access?);
        };
        let mut faults = self.faults.borrow_mut();
        if faults.len() < FAULTS_KEPT {
            faults.push(fault);
        }
        Ok(())
    }
}

/// The parts of `[gpa..gpa + len)` that lie in one page each, and their lengths.
fn pages(gpa: Gpa, len: u64) -> impl Iterator<Item = (Gpa, usize)> {
    // What reaches past the last address is beyond memory anyway.
    let end = gpa.get().saturating_add(len);
    let mut next = gpa.get();
    std::iter::from_fn(move || {
        let count = (PAGE_SIZE - next % PAGE_SIZE).min(end - next);
        let at = Gpa::new(next);
        next += count;
        (count > 0).then(|| (at, usize::try_from(count).expect("at most a page")))
    })
}

/// The addresses of words from `gpa` on.
fn words(gpa: Gpa) -> impl Iterator<Item = Gpa> {
    (gpa.get()..).step_by(8).map(Gpa::new)
}
