//! Turns: who goes first where several wait.

use super::*;

/// Who waits, by his own place.
#[derive(Default)]
struct Waits(Option<Turn>);

impl Waits {
    /// Whether a conversion begins; it is taken through if it does.
    fn converts(&mut self, engine: &mut Engine, range: PageRange, to: Visibility) -> bool {
        let asked = request(range, to, Contents::Preserve);
        let (begun, _) = engine.in_turn(&mut self.0, |engine| engine.convert(&asked));
        match begun {
            Ok(Start::Claimed(draining)) => {
                end(engine, draining);
                true
            }
            Ok(Start::AlreadySo) => panic!("there is something to convert"),
            Err(Blocked::Busy(_)) => false,
            Err(other) => panic!("{other:?}"),
        }
    }

    /// Whether a touch of the host view is answered.
    fn touches(&mut self, engine: &mut Engine, page: u32) -> bool {
        let touch = |engine: &mut Engine| engine.touch(View::Host, page.into());
        match engine.in_turn(&mut self.0, touch).0 {
            TouchAnswer::Now(answer) => {
                engine.answered(answer, None);
                true
            }
            TouchAnswer::Wait => false,
            other => panic!("{other:?}"),
        }
    }
}

fn begin(engine: &mut Engine, range: PageRange) -> Operation<Draining> {
    match claim(engine, &request(range, Visibility::Shared, Contents::Preserve)) {
        Ok(Start::Claimed(draining)) => draining,
        other => panic!("{other:?}"),
    }
}

fn end(engine: &mut Engine, operation: Operation<Draining>) {
    let operation = engine.undo(operation);
    undo(engine, operation, true);
}

#[test]
fn an_operation_lets_those_go_first_who_came_before_it_and_a_touch_lets_nobody() {
    let mut engine = plain();
    share(&mut engine, pages(0, 8));
    let [mut first, mut second, mut touch, mut other] = [(); 4].map(|()| Waits::default());
    let running = begin(&mut engine, pages(8, 9));
    let private = Visibility::Private;
    // The first waits for the one that runs, the others for pages that only he waits for.
    assert!(!first.converts(&mut engine, pages(4, 9), private.other()));
    assert!(!first.converts(&mut engine, pages(4, 9), private.other()), "it is where it was");
    assert!(!second.converts(&mut engine, pages(7, 8), private));
    assert!(touch.touches(&mut engine, 7), "no operation holds the page");
    assert!(other.converts(&mut engine, pages(0, 1), private), "nobody waits for it");
    let refused = claim(&mut engine, &request(pages(0, 8), private, Contents::Preserve));
    assert_eq!(refused.unwrap_err(), Refusal::Awaited { range: pages(0, 8), held: pages(4, 9) });

    end(&mut engine, running);
    assert!(!second.converts(&mut engine, pages(7, 8), private), "it is the first one's turn");
    assert!(first.converts(&mut engine, pages(4, 9), private.other()));
    assert!(second.converts(&mut engine, pages(7, 8), private));
}

#[test]
fn a_touch_that_waits_goes_before_an_operation_that_comes_later() {
    let mut engine = plain();
    let [mut touch, mut next] = [(); 2].map(|()| Waits::default());
    let running = begin(&mut engine, pages(8, 9));
    assert!(!touch.touches(&mut engine, 8));
    end(&mut engine, running);
    assert!(!next.converts(&mut engine, pages(8, 9), Visibility::Shared));
    assert!(touch.touches(&mut engine, 8), "denied, which is an answer");
    assert!(next.converts(&mut engine, pages(8, 9), Visibility::Shared));
}

#[test]
fn who_leaves_or_is_refused_is_in_nobodys_way() {
    let mut engine = plain();
    let [mut leaves, mut refused, mut next] = [(); 3].map(|()| Waits::default());
    let running = begin(&mut engine, pages(8, 9));
    assert!(!leaves.converts(&mut engine, pages(8, 9), Visibility::Shared));
    let pin = |engine: &mut Engine| engine.pin(pages(8, 9), PinKind::Short, Holder::new("disk"));
    assert!(matches!(engine.in_turn(&mut refused.0, pin), (Err(Blocked::Busy(_)), false)));
    end(&mut engine, running);
    engine.leave(leaves.0.unwrap());
    assert!(!next.converts(&mut engine, pages(8, 9), Visibility::Shared));
    let (private, told) = engine.in_turn(&mut refused.0, pin);
    assert!(matches!(private, Err(Blocked::Refused(Refusal::Private { .. }))), "{private:?}");
    assert!(told && refused.0.is_none(), "who waits behind it is told");
    assert!(next.converts(&mut engine, pages(8, 9), Visibility::Shared));
}

#[test]
fn a_population_lets_nobody_go_first() {
    let mut engine = engine(Platform::Plain, Population::Owed);
    let mut waits = Waits::default();
    let running = begin(&mut engine, pages(8, 9));
    assert!(!waits.converts(&mut engine, pages(8, 10), Visibility::Shared));
    let population = engine.populate(pages(9, 10));
    let population = engine.undo(population.expect("whoever waits may wait for just that"));
    undo(&mut engine, population, true);
    end(&mut engine, running);
}

#[test]
fn who_waits_for_pins_is_not_held_up_by_those_who_wait_for_him() {
    let mut engine = plain();
    share(&mut engine, pages(8, 9));
    let private = Visibility::Private;
    let activity = Activity::Conversion { to: private, contents: Contents::Preserve, by: None };
    let wait =
        |engine: &mut Engine| engine.wait_for_pins(&[pages(8, 9)], WaitFor::Operation(activity));
    let holder = Holder::new("disk");
    let held = engine.pin(pages(8, 9), PinKind::Short, holder.clone()).unwrap();
    let pin = |engine: &mut Engine| engine.pin(pages(8, 9), PinKind::Short, holder.clone());
    let [mut first, mut pinner, mut second, mut third] = [(); 4].map(|()| Waits::default());
    let waiting = engine.in_turn(&mut first.0, wait).0.unwrap();
    assert!(matches!(engine.in_turn(&mut pinner.0, pin).0, Err(Blocked::Busy(_))));
    assert!(matches!(engine.in_turn(&mut second.0, wait).0, Err(Blocked::Busy(_))));
    engine.unpin(held);
    assert!(first.converts(&mut engine, pages(8, 9), private), "all wait for its end");
    engine.stop_waiting(waiting);
    // Another one that wants the same lets them go first.
    assert!(matches!(engine.in_turn(&mut third.0, wait).0, Err(Blocked::Busy(_))));
    let pinned = engine.in_turn(&mut pinner.0, pin).0.unwrap();
    engine.unpin(pinned);
    let waiting = engine.in_turn(&mut second.0, wait).0.unwrap();
    engine.stop_waiting(waiting);
    let waiting = engine.in_turn(&mut third.0, wait).0.unwrap();
    engine.stop_waiting(waiting);
}

#[test]
fn who_meets_an_abandoned_operation_keeps_his_place_until_he_has_undone_it() {
    let mut engine = plain();
    let [mut waits, mut next] = [(); 2].map(|()| Waits::default());
    let running = begin(&mut engine, pages(8, 9));
    assert!(!waits.converts(&mut engine, pages(8, 9), Visibility::Shared));
    drop(running);
    let asked = request(pages(8, 9), Visibility::Shared, Contents::Preserve);
    let (met, _) = engine.in_turn(&mut waits.0, |engine| engine.convert(&asked));
    let Err(Blocked::Abandoned(operation)) = met else { panic!("{met:?}") };
    undo(&mut engine, operation, true);
    assert!(!next.converts(&mut engine, pages(8, 9), Visibility::Shared));
    assert!(waits.converts(&mut engine, pages(8, 9), Visibility::Shared));
    assert!(next.converts(&mut engine, pages(8, 9), Visibility::Shared));
}
