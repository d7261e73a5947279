//! Random programs: scenarios that say what is done, and nothing of what is expected.
//!
//! A seed makes a program. It is written so that it is the same run each time: bytes are named by
//! the step that writes them, and who can't do a step yet is resumed first
//! ([`polder_play::record`]).

use std::collections::BTreeMap;

use polder::units::{Gpa, PAGE_SIZE, PageCount, PageRange};
use polder::{Contents, HostKind, PageSize, PinKind, Platform, Reached, Visibility};
use polder_play::{
    Actor, Bytes, DEFAULT_GPA, Expect, Hold, Kind, MemorySpec, Place, Scenario, SlotSpec, Step,
    Verb, VmSpec,
};

use crate::left_out::{Feature, is_left_out};
use crate::random::Random;

/// Where slots are: the second GPA leaves no room for what is bound at the first.
const GPAS: [Gpa; 3] = [DEFAULT_GPA, Gpa::new(0x4000_4000), Gpa::new(0x8000_0000)];

/// Where in a page bytes begin: the last two reach into the next page.
const OFFSETS: [(u64, u64); 5] = [(50, 0), (20, 8), (10, 0x800), (10, 0xff8), (5, 0xffc)];

/// The program of a seed, for hosts that are to be compared.
pub fn program(seed: u64, hosts: &[HostKind]) -> Scenario {
    let mut random = Random::new(seed);
    let left_out = |feature| is_left_out(feature, hosts);
    // Few pages, half of the time: steps meet there.
    let most = random.one_of(&[5, 17]);
    let pages = random.between(2, most);
    let memory = MemorySpec {
        pages: PageCount::new(pages).expect("a few pages"),
        platform: match random.percent(10) {
            true => Platform::SwProtected,
            false => Platform::Plain,
        },
        starts: random.one_of(&[Visibility::Private, Visibility::Shared]),
        owed: random.percent(12) && !left_out(Feature::Owed),
        page_size: PageSize::Small,
        pool: None,
    };
    let vms = if random.percent(30) && !left_out(Feature::SecondVm) { 2 } else { 1 };
    let mut maker = Maker {
        preserve: !left_out(Feature::Preserve),
        unspecified: !left_out(Feature::Unspecified),
        // Which kind an access is of is told from the other on some hosts only.
        guests: memory.platform == Platform::Plain || !left_out(Feature::AccessAs),
        part_of_word: !left_out(Feature::PartOfWord),
        random,
        memory,
        vms: Vec::new(),
        steps: Vec::new(),
    };
    for vm in 0..vms {
        let vm = maker.vm(vm);
        maker.vms.push(vm);
    }
    let actors = maker.actors();
    for _ in 0..maker.random.between(3, 25) {
        maker.step(&actors);
    }
    maker.read_all(&actors);
    Scenario {
        about: format!("The program of seed {seed}"),
        thread: None,
        invariants: Vec::new(),
        hosts: hosts.to_vec(),
        discrepancy: None,
        memory,
        vms: maker.vms,
        actors,
        steps: maker.steps,
        expect: Vec::new(),
    }
}

struct Maker {
    random: Random,
    memory: MemorySpec,
    vms: Vec<VmSpec>,
    steps: Vec<Step>,
    preserve: bool,
    unspecified: bool,
    guests: bool,
    part_of_word: bool,
}

/// What a step is to be.
#[derive(Clone, Copy)]
enum What {
    Convert,
    Want,
    Discard,
    Populate,
    Fail,
    Settle,
    Bind,
    Unbind,
    Read,
    Write,
    Pin,
    Unpin,
    Resume,
}

type Actors = BTreeMap<String, Actor>;

impl Maker {
    fn pages(&self) -> u64 {
        self.memory.pages.get()
    }

    /// A VM, most often with one slot for all.
    fn vm(&mut self, number: usize) -> VmSpec {
        let pages = self.pages();
        let slot = |slot, start, end, gpa| SlotSpec {
            slot,
            pages: PageRange::between(start, end).expect("pages of a small memory"),
            gpa,
        };
        let middle = self.random.between(1, pages);
        let slots = match self.random.between(0, 10) {
            0..7 => vec![slot(0, 0, pages, DEFAULT_GPA)],
            7 => vec![slot(0, 0, middle, GPAS[2]), slot(1, middle, pages, DEFAULT_GPA)],
            8 => vec![slot(0, 0, middle, DEFAULT_GPA)],
            _ if self.random.percent(70) => vec![slot(0, middle, pages, GPAS[1])],
            _ => Vec::new(),
        };
        VmSpec {
            name: if number == 0 { "vm".into() } else { "other".into() },
            asid: None,
            tables: None,
            slots,
        }
    }

    fn actors(&self) -> Actors {
        let given = |kind: Kind| (kind.name().to_owned(), Actor { kind, vm: 0, declared: false });
        let mut actors = Actors::from(Kind::ALL.map(given));
        let mut declare = |name: &str, kind, vm| {
            actors.insert(name.to_owned(), Actor { kind, vm, declared: true });
        };
        let other = self.vms.len() - 1;
        declare("vmm-2", Kind::Vmm, other);
        declare("device-2", Kind::Device, other);
        if other > 0 {
            declare("guest-2", Kind::Guest, other);
        }
        actors
    }

    fn push(&mut self, actor: &str, verb: Verb, hold: Option<Hold>) {
        let (actor, line) = (Some(actor.to_owned()), self.steps.len() + 1);
        self.steps.push(Step { line, actor, verb, hold, expect: Expect::default() });
    }

    /// The name of somebody who is one of these.
    fn somebody(&mut self, actors: &Actors, kinds: &[Kind]) -> (String, Actor) {
        let found = actors.iter().filter(|(_, actor)| kinds.contains(&actor.kind));
        let found: Vec<_> = found.collect();
        let (name, actor) = self.random.one_of(&found);
        (name.clone(), actor.clone())
    }

    fn step(&mut self, actors: &Actors) {
        let owed = if self.memory.owed { 8 } else { 1 };
        let what = self.random.weighted(&[
            (24, What::Convert),
            (3, What::Want),
            (6, What::Discard),
            (owed, What::Populate),
            (owed / 4 + 1, What::Fail),
            (1, What::Settle),
            (4, What::Bind),
            (4, What::Unbind),
            (22, What::Read),
            (22, What::Write),
            (7, What::Pin),
            (5, What::Unpin),
            (5, What::Resume),
        ]);
        let kinds: &[Kind] = match what {
            What::Convert => &[Kind::Vmm, Kind::Guest],
            What::Read | What::Write if self.guests => &[Kind::Vmm, Kind::Device, Kind::Guest],
            What::Read | What::Write => &[Kind::Vmm, Kind::Device],
            What::Pin | What::Unpin => &[Kind::Vmm, Kind::Device],
            What::Resume => &[Kind::Vmm, Kind::Device, Kind::Guest],
            _ => &[Kind::Vmm],
        };
        let (name, actor) = self.somebody(actors, kinds);
        let hold = self.hold(what);
        let verb = self.verb(what, &actor);
        self.push(&name, verb, hold);
    }

    fn verb(&mut self, what: What, actor: &Actor) -> Verb {
        match what {
            What::Convert => Verb::Convert {
                place: self.place(actor.vm),
                to: self.visibility(),
                contents: self.contents(),
                wait: self.random.percent(80),
            },
            What::Want => {
                let vm = self.some_vm();
                Verb::Want { place: self.place(vm), vm, to: self.visibility() }
            }
            What::Discard => Verb::Discard { place: self.place(actor.vm) },
            What::Populate => {
                let bytes = self.text(16);
                Verb::Populate { place: self.place(actor.vm), bytes }
            }
            What::Fail => Verb::Fail { place: self.place(actor.vm) },
            What::Settle => Verb::Settle,
            What::Bind => {
                let (pages, gpa) = (self.range(), self.random.one_of(&GPAS));
                let slot = SlotSpec { slot: self.slot(), pages, gpa };
                Verb::Bind { vm: self.some_vm(), slot }
            }
            What::Unbind => Verb::Unbind { vm: self.some_vm(), slot: self.slot() },
            What::Read => {
                Verb::Read { from: self.bytes(actor), length: self.random.one_of(&[8, 16]) }
            }
            What::Write => {
                let length = self.random.one_of(&[8, 16]);
                Verb::Write { to: self.bytes(actor), bytes: self.text(length) }
            }
            What::Pin => {
                let kind = self.random.one_of(&[PinKind::Short, PinKind::LongTerm]);
                Verb::Pin { place: self.place(actor.vm), kind, name: self.name() }
            }
            What::Unpin => Verb::Unpin { name: self.name() },
            What::Resume => Verb::Resume { hold: None },
        }
    }

    /// Where an operation is held: most are not, for then others wait, and that takes time.
    fn hold(&mut self, what: What) -> Option<Hold> {
        let stages: &[Reached] = match what {
            What::Convert => &[
                Reached::Claimed,
                Reached::Drained,
                Reached::Unmapped,
                Reached::Unpinned,
                Reached::Reshaped,
                Reached::Protected,
                Reached::Settled,
            ],
            What::Discard => &[Reached::Claimed, Reached::Drained, Reached::Cleared],
            What::Populate => &[Reached::Claimed, Reached::Written, Reached::Published],
            _ => return None,
        };
        self.random.percent(9).then(|| Hold::At(self.random.one_of(stages)))
    }

    fn visibility(&mut self) -> Visibility {
        self.random.one_of(&[Visibility::Private, Visibility::Shared])
    }

    fn contents(&mut self) -> Contents {
        let preserve = if self.preserve { 45 } else { 0 };
        let unspecified = if self.unspecified { 30 } else { 0 };
        self.random.weighted(&[
            (preserve, Contents::Preserve),
            (unspecified, Contents::Unspecified),
            (25, Contents::Zero),
        ])
    }

    fn some_vm(&mut self) -> usize {
        let vms = self.vms.len() as u64;
        usize::try_from(self.random.between(0, vms)).unwrap_or(0)
    }

    fn slot(&mut self) -> u32 {
        self.random.weighted(&[(40, 0), (30, 1), (25, 2), (5, 7)])
    }

    fn name(&mut self) -> String {
        self.random.one_of(&["a", "b"]).to_owned()
    }

    /// Pages, a few of them beyond the memory.
    fn range(&mut self) -> PageRange {
        let pages = self.pages();
        let (start, end) = match self.random.between(0, 20) {
            0 => (self.random.between(0, pages), pages + self.random.between(1, 3)),
            1 => (pages, pages + 1),
            2 | 3 => (0, pages),
            4..12 => {
                let page = self.random.between(0, pages);
                (page, page + 1)
            }
            _ => {
                let start = self.random.between(0, pages);
                (start, self.random.between(start + 1, pages + 1))
            }
        };
        PageRange::between(start, end).expect("pages near a small memory")
    }

    /// Pages, or guest frames of a VM, a few of them bound nowhere.
    fn place(&mut self, vm: usize) -> Place {
        if self.random.percent(60) {
            return Place::Pages(self.range());
        }
        let slots = &self.vms[vm].slots;
        let mut bases: Vec<Gpa> = slots.iter().map(|slot| slot.gpa).collect();
        if bases.is_empty() || self.random.percent(15) {
            bases.extend([GPAS[0], GPAS[2]]);
        }
        let base = self.random.one_of(&bases);
        let into = self.random.between(0, self.pages() + 1);
        let gpa = base.checked_add(into * PAGE_SIZE).unwrap_or(base);
        let count = self.random.weighted(&[(60, 1), (20, 2), (15, 3), (5, 8)]);
        Place::Gpa(gpa, PageCount::new(count).expect("a few pages"))
    }

    /// Where bytes are to be moved: whole words, where the guest is on KVM.
    fn bytes(&mut self, actor: &Actor) -> Bytes {
        let place = self.place(actor.vm);
        let at = self.random.weighted(&OFFSETS);
        let words = actor.kind == Kind::Guest && !self.part_of_word;
        Bytes { place, at: if words { at & !7 } else { at }, side: Visibility::Private }
    }

    /// Bytes that are written nowhere else.
    fn text(&self, length: usize) -> String {
        let step = self.steps.len() + 1;
        format!("step{step:03}.").chars().cycle().take(length).collect()
    }

    /// Has everybody end his step, all contents come or not, and who can read everything.
    fn read_all(&mut self, actors: &Actors) {
        for name in actors.keys() {
            self.push(name, Verb::Resume { hold: None }, None);
        }
        self.push("vmm", Verb::Settle, None);
        let read = |page| {
            let place = Place::Pages(PageRange::between(page, page + 1).expect("a page"));
            let from = Bytes { place, at: 0, side: Visibility::Private };
            Verb::Read { from, length: 16 }
        };
        for page in 0..self.pages() {
            self.push("device", read(page), None);
        }
        if !self.guests {
            return;
        }
        let guests = actors.iter().filter(|(_, actor)| actor.kind == Kind::Guest);
        for (name, _) in guests {
            let page = self.random.between(0, self.pages());
            self.push(name, read(page), None);
        }
        for page in 0..self.pages() {
            if self.random.percent(40) {
                self.push("guest", read(page), None);
            }
        }
    }
}
