//! A wish that is changed while a conversion is on its way to grant another.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use polder::units::{Gfn, GfnRange, PageCount, PageRange};
use polder::{Contents, HostKind, Memory, Moment, OnBusy, Reached, Slot, Visibility, Watch, Wish};

/// Holds the conversion at a stage until somebody else waits, or says that he did not have to.
struct HeldAt {
    stage: Reached,
    converter: ThreadId,
    reached: Sender<()>,
    waits: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Watch for HeldAt {
    fn at(&self, moment: Moment) {
        if moment == Moment::Reached(self.stage) {
            self.reached.send(()).unwrap();
            self.go_on.lock().unwrap().recv().unwrap();
        } else if moment == Moment::Waits && std::thread::current().id() != self.converter {
            // Nobody may listen any more: one wait is enough.
            let _ = self.waits.send(());
        }
    }
}

#[test]
fn a_wish_that_comes_amid_a_conversion_is_not_taken_for_granted_by_it() {
    for stage in [Reached::Claimed, Reached::Unmapped, Reached::Settled] {
        let count = PageCount::from(8);
        let memory = Memory::builder(count).host(HostKind::Machine).build().unwrap();
        let vm = memory.attach(polder::Vm::Machine).unwrap();
        let all = PageRange::between(0, count.get()).unwrap();
        memory.bind(vm, Slot(0), Gfn::from(0), all).unwrap();

        let gfns = GfnRange::between(2, 6).unwrap();
        let ((reached, is_reached), (waits, has_to_wait)) = (channel(), channel());
        let (let_go, go_on) = channel();
        let decided = waits.clone();
        let converter = std::thread::current().id();
        let go_on = Mutex::new(go_on);
        memory.watch(Arc::new(HeldAt { stage, converter, reached, waits, go_on }));
        std::thread::scope(|scope| {
            let memory = &memory;
            scope.spawn(move || {
                is_reached.recv().unwrap();
                scope.spawn(move || {
                    // The guest has changed its mind.
                    let frame = GfnRange::between(5, 8).unwrap();
                    memory.want(vm, frame, Visibility::Private).unwrap();
                    let _ = decided.send(());
                });
                has_to_wait.recv().unwrap();
                let_go.send(()).unwrap();
            });
            let (to, contents) = (Visibility::Shared, Contents::Preserve);
            memory.convert_gfns(vm, gfns, to, contents, OnBusy::Wait).unwrap();
        });
        let pages = PageRange::between(5, 6).unwrap();
        let (granted, wanted) = (Visibility::Shared, Visibility::Private);
        let wish = Wish { pages, granted, wanted };
        assert_eq!(memory.unmet(), [(vm, Slot(0), wish)], "{stage}: the later wish counts");
    }
}
