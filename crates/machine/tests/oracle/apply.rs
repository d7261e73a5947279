//! Each action done on the machine and on the oracle, and the outcomes compared.

use polder_machine::{Error, Exit, GupFast, GupStep, Machine, PinKind, Side};
use polder_units::{Gpa, Level, PageCount};

use crate::action::Action;
use crate::naive::{Touch, geometry, pages_of, touch_of};
use crate::{OWNER, PAGES, Rig, index, page_range, vpn, vpns};

impl Rig {
    pub(crate) fn memory(&mut self, action: Action) {
        let Self { machine, object, naive, .. } = self;
        match action {
            Action::Allocate(page, level) => {
                let range = pages_of(page, level);
                let free = !range.clone().any(|page| naive.pages.contains_key(&page));
                let expected = range.start == page && range.end <= PAGES && free;
                assert_eq!(machine.allocate(*object, index(page), level).is_ok(), expected);
                if expected {
                    naive.add(page, level);
                }
            }
            Action::Punch(page, len) => {
                let range = page..page + len;
                let held = |page: &u64| {
                    naive.level(*page).is_some_and(|level| {
                        let folio = pages_of(*page, level);
                        folio.start < range.start || folio.end > range.end || naive.mapped(&folio)
                    })
                };
                let expected = !range.clone().any(|page| held(&page));
                let outcome = machine.punch(*object, page_range(page, len), None);
                assert_eq!(outcome.is_ok(), expected, "{outcome:?}");
                if expected {
                    naive.pages.retain(|page, _| !range.contains(page));
                    self.zap_guest(&range);
                }
            }
            Action::Zero(page, len) => {
                let outcome = machine.zero(*object, page_range(page, len));
                assert_eq!(outcome.is_ok(), page + len <= PAGES);
                if outcome.is_ok() {
                    for (_, frame) in naive.pages.range(page..page + len) {
                        naive.values[*frame] = 0;
                    }
                }
            }
            _ => unreachable!(),
        }
    }

    pub(crate) fn reshape(&mut self, action: Action) {
        let Self { machine, object, naive, .. } = self;
        match action {
            Action::Split(page) => {
                let level = naive.level(page);
                let locked = machine
                    .backing(*object, index(page))
                    .unwrap()
                    .is_some_and(|it| machine.lock_folio(it.pfn, OWNER).is_ok());
                let outcome = machine.split_folio(*object, index(page), OWNER);
                let expected = level.is_some_and(|level| {
                    let folio = naive.folio_of[naive.pages[&page]];
                    level > Level::Size4K
                        && !naive.mapped(&pages_of(page, level))
                        && naive.pins_of(folio) == 0
                });
                assert_eq!(outcome.is_ok(), expected, "{outcome:?}");
                if locked {
                    let pfn = machine.backing(*object, index(page)).unwrap().unwrap().pfn;
                    machine.unlock_folio(pfn, OWNER).unwrap();
                }
                if let (Some(level), true) = (level, expected) {
                    let below = level.smaller().unwrap();
                    let pages = geometry().pages(below).get();
                    for page in pages_of(page, level) {
                        if page % pages == 0 {
                            naive.levels.push(below);
                        }
                        naive.folio_of[naive.pages[&page]] = naive.levels.len() - 1;
                    }
                    self.zap_guest(&pages_of(page, level));
                }
            }
            Action::Merge(page, level) => {
                let range = pages_of(page, level);
                let pfns: Vec<_> = range
                    .clone()
                    .filter_map(|page| machine.backing(*object, index(page)).unwrap())
                    .map(|it| it.pfn.get())
                    .collect();
                let pages = geometry().pages(level).get();
                let block = pfns.len() as u64 == pages
                    && pfns[0] % pages == 0
                    && pfns.iter().zip(pfns[0]..).all(|(pfn, next)| *pfn == next);
                let pinned = |page: &u64| naive.pins_of(naive.folio_of[naive.pages[page]]) > 0;
                let expected = block
                    && naive.level(page).is_some_and(|there| there < level)
                    && !naive.mapped(&range)
                    && !range.clone().any(|page| pinned(&page));
                let outcome = machine.merge_folios(*object, index(page), level, OWNER);
                assert_eq!(outcome.is_ok(), expected, "{outcome:?}");
                if expected {
                    naive.levels.push(level);
                    range.for_each(|page| {
                        naive.folio_of[naive.pages[&page]] = naive.levels.len() - 1;
                    });
                }
            }
            _ => unreachable!(),
        }
    }

    pub(crate) fn map(&mut self, action: Action) {
        let Self { machine, processes, naive, .. } = self;
        match action {
            Action::Map(process, page, level) => {
                let range = pages_of(page, level);
                let view = [Level::Size1G, Level::Size4K][process];
                let expected = naive.level(page).is_some_and(|folio| level <= folio.min(view))
                    && !naive.any_entry(process, &range);
                let outcome = machine.host_map(processes[process], vpn(page), level);
                assert_eq!(outcome.is_ok(), expected, "{outcome:?}");
                if expected {
                    naive.poison[process].retain(|page| !range.contains(page));
                    naive.entries[process].insert(range.start, level);
                }
            }
            Action::MapRange(process, page, len) => {
                let mut done = 0;
                while done < len {
                    let at = page + done;
                    let view = [Level::Size1G, Level::Size4K][process];
                    let fits = |level: &Level| {
                        let range = pages_of(at, *level);
                        naive.level(at).is_some_and(|folio| *level <= folio.min(view))
                            && range.start >= page
                            && range.end <= page + len
                            && !naive.any_entry(process, &range)
                    };
                    let there = naive.entry(process, at);
                    let level = Level::ALL.into_iter().rev().find(fits);
                    let Some(level) = there.or(level) else { break };
                    let range = pages_of(at, level);
                    if there.is_none() {
                        naive.poison[process].retain(|page| !range.contains(page));
                        naive.entries[process].insert(range.start, level);
                    }
                    done = range.end.min(page + len) - page;
                }
                let outcome = machine.host_map_range(processes[process], vpns(page, len));
                assert_eq!(outcome.map_or(0, PageCount::get), done);
            }
            _ => unreachable!(),
        }
    }

    pub(crate) fn unmap(&mut self, action: Action) {
        let Self { machine, object, processes, naive, .. } = self;
        match action {
            Action::Unmap(process, page, len) => {
                machine.host_unmap(processes[process], vpns(page, len)).unwrap();
                naive.poison[process].retain(|at| !(page..page + len).contains(at));
                naive.drop_entries(process, &(page..page + len));
                machine.flush_process(processes[process], vpns(page, len)).unwrap();
            }
            Action::Zap(page, len) => {
                machine.zap_object(*object, page_range(page, len)).unwrap();
                (0..2).for_each(|process| naive.drop_entries(process, &(page..page + len)));
                machine.flush_object(*object, page_range(page, len)).unwrap();
            }
            Action::Poison(process, page, len) => {
                let range = page..page + len;
                let expected =
                    process == 0 && range.end <= PAGES && !naive.any_entry(process, &range);
                let outcome = machine.host_poison(processes[process], vpns(page, len));
                assert_eq!(outcome.is_ok(), expected, "{outcome:?}");
                if expected {
                    naive.poison[process].extend(range);
                }
            }
            _ => unreachable!(),
        }
    }

    pub(crate) fn touch(&mut self, action: Action) {
        match action {
            Action::Write(process, page, value) => {
                let (thread, hva) = (self.thread(process), vpn(page).hva());
                let outcome = self.machine.host_write(thread, hva, &value.to_le_bytes());
                let expected = self.naive.touch(process, page);
                assert_eq!(touch_of(&outcome), expected);
                if expected == Touch::Done {
                    self.naive.values[self.naive.pages[&page]] = value;
                }
            }
            Action::Read(process, page) => {
                let mut word = [0; 8];
                let (thread, hva) = (self.thread(process), vpn(page).hva());
                let outcome = self.machine.host_read(thread, hva, &mut word);
                let expected = self.naive.touch(process, page);
                assert_eq!(touch_of(&outcome), expected);
                if expected == Touch::Done {
                    let value = self.naive.values[self.naive.pages[&page]];
                    assert_eq!(u64::from_le_bytes(word), value);
                }
            }
            _ => unreachable!(),
        }
    }

    pub(crate) fn pin(&mut self, action: Action) {
        let Self { machine, processes, naive, .. } = self;
        match action {
            Action::Pin(process, page) => {
                let range = vpns(page, 1);
                let kind = PinKind::LongTerm;
                let outcome = machine.pin_user_pages(processes[process], range, true, kind);
                assert_eq!(touch_of(&outcome), naive.touch(process, page));
                if let Ok(pin) = outcome {
                    naive.pins.push((pin, naive.pages[&page]));
                }
            }
            Action::GupFast(process, page) => {
                let gup = GupFast::new(processes[process], vpn(page), true, PinKind::Short);
                let mut step = GupStep::Again(gup);
                while let GupStep::Again(gup) = step {
                    step = gup.step(machine).unwrap();
                }
                let mapped = naive.entry(process, page).is_some();
                assert_eq!(matches!(step, GupStep::Pinned(_)), mapped);
                if let GupStep::Pinned(pin) = step {
                    naive.pins.push((pin, naive.pages[&page]));
                }
            }
            Action::Unpin(nth) if nth < naive.pins.len() => {
                let (pin, _) = naive.pins.remove(nth);
                machine.unpin(pin).unwrap();
            }
            Action::Unpin(_) => {}
            Action::Dma(nth, value) => {
                let Some((pin, frame)) = naive.pins.get(nth).copied() else { return };
                let mut word = [0; 8];
                machine.dma_read(pin, 0, &mut word).unwrap();
                assert_eq!(u64::from_le_bytes(word), naive.values[frame]);
                machine.dma_write(pin, 0, &value.to_le_bytes()).unwrap();
                naive.values[frame] = value;
            }
            _ => unreachable!(),
        }
    }

    pub(crate) fn guest(&mut self, page: u64, write: Option<u64>) {
        let gpa = Gpa::new(page << 12);
        let access = |machine: &mut Machine, vcpu| {
            let mut vcpu = machine.vcpu(vcpu).unwrap();
            match write {
                Some(value) => vcpu.write_u64(gpa, Side::Shared, value).map(|()| value),
                None => vcpu.read_u64(gpa, Side::Shared),
            }
        };
        let mut outcome = access(&mut self.machine, self.vcpu);
        if let Err(Exit::Fault(fault)) = outcome {
            match self.machine.tdp_resolve(self.vm, fault.gfn) {
                Ok(resolved) => {
                    self.machine.tdp_map(&resolved, resolved.largest(), true).unwrap();
                    outcome = access(&mut self.machine, self.vcpu);
                }
                Err(error) => assert!(matches!(error, Error::Hole { .. }), "{error}"),
            }
        }
        let Some(frame) = self.naive.pages.get(&page).copied() else {
            assert!(outcome.is_err());
            return;
        };
        if let Some(value) = write {
            self.naive.values[frame] = value;
        }
        assert_eq!(outcome.unwrap(), self.naive.values[frame]);
    }
}
