//! Read-ahead: how much to bring when one page is asked for. Pure, and told everything.
//!
//! A *stream* is somebody who goes through memory upwards. A demand at the page where a stream's
//! last window ended continues it, and its window doubles. Any other demand starts a stream, with
//! the *initial* window. Whether that was well spent is seen later: a stream that is continued used
//! its window up; one that never is may have used a part of it. So the initial window grows when
//! streams are continued, shrinks when they are not, and is one page where demands are random:
//! nothing is wasted there for long.
//!
//! A continued stream has used as much as it is then given more: no more than half of what a stream
//! was given can be wasted.

/// The most pages of a window: 2 MiB.
const MOST: u64 = 512;

/// The most pages of an initial window.
const MOST_INITIAL: u64 = 32;

/// What the initial window is before anything is known.
const INITIAL: u64 = 8;

/// How many streams are followed at a time.
const STREAMS: usize = 16;

/// A stream may pass over as many pages that it did not need to ask for.
const SLACK: u64 = 4;

/// What a continued stream counts for, against one that was not, and the sum that changes the
/// initial window. A fault costs a guest as much as some thirty pages read too many.
const CONTINUED: i32 = 2;
const DROPPED: i32 = 1;
const ENOUGH: i32 = 8;

/// How much is brought with a page that somebody waits for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum ReadAhead {
    /// As much as earlier demands suggest.
    #[default]
    Adaptive,
    /// That page alone.
    Off,
}

/// A [`ReadAhead`] at work.
#[derive(Debug)]
pub(crate) struct Windows {
    kind: ReadAhead,
    /// The most recent last.
    streams: Vec<Stream>,
    initial: u64,
    score: i32,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The first page that it was not given.
    next: u64,
    window: u64,
    continued: bool,
}

impl Windows {
    pub(crate) const fn new(kind: ReadAhead) -> Self {
        Self { kind, streams: Vec::new(), initial: INITIAL, score: 0 }
    }

    /// How many pages to bring, from `page` on, now that it is asked for: 1 at least.
    pub(crate) fn window(&mut self, page: u64) -> u64 {
        if self.kind == ReadAhead::Off {
            return 1;
        }
        let met = |stream: &Stream| (stream.next..=stream.next + SLACK).contains(&page);
        let stream = match self.streams.iter().position(met) {
            Some(at) => {
                let stream = self.streams.remove(at);
                if !stream.continued {
                    self.learn(CONTINUED);
                }
                let window = (2 * stream.window).min(MOST);
                Stream { next: page + window, window, continued: true }
            }
            None => {
                if self.streams.len() == STREAMS && !self.streams.remove(0).continued {
                    self.learn(-DROPPED);
                }
                Stream { next: page + self.initial, window: self.initial, continued: false }
            }
        };
        self.streams.push(stream);
        stream.window
    }

    fn learn(&mut self, by: i32) {
        self.score += by;
        if self.score >= ENOUGH {
            self.initial = (2 * self.initial).min(MOST_INITIAL);
            self.score = 0;
        } else if self.score <= -ENOUGH {
            self.initial = (self.initial / 2).max(1);
            self.score = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages brought, and demands made, by who touches `pages`.
    fn touch(windows: &mut Windows, pages: impl Iterator<Item = u64>) -> (u64, u64) {
        let mut there = std::collections::BTreeSet::new();
        let (mut brought, mut demands) = (0, 0);
        for page in pages {
            if there.contains(&page) {
                continue;
            }
            demands += 1;
            let window = windows.window(page);
            brought += (page..page + window).filter(|&page| there.insert(page)).count() as u64;
        }
        (brought, demands)
    }

    fn random(seed: &mut u64) -> u64 {
        *seed =
            seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *seed >> 33
    }

    #[test]
    fn off_brings_what_is_asked_for() {
        assert_eq!(touch(&mut Windows::new(ReadAhead::Off), 0..100), (100, 100));
    }

    #[test]
    fn who_goes_straight_on_asks_seldom() {
        let (brought, demands) = touch(&mut Windows::new(ReadAhead::Adaptive), 0..65536);
        assert!(demands < 160, "{demands}");
        assert!(brought <= 65536 + MOST, "{brought}");
    }

    #[test]
    fn several_who_go_straight_on_are_told_apart() {
        let pages = (0..4096).flat_map(|step| (0..8).map(move |who| who * 1_000_000 + step));
        let (_, demands) = touch(&mut Windows::new(ReadAhead::Adaptive), pages);
        assert!(demands < 8 * 20, "{demands}");
    }

    #[test]
    fn random_demands_soon_waste_nothing() {
        let mut windows = Windows::new(ReadAhead::Adaptive);
        let mut seed = 1;
        touch(&mut windows, (0..200).map(|_| random(&mut seed) % (1 << 31) * 64));
        let (brought, demands) =
            touch(&mut windows, (0..1000).map(|_| random(&mut seed) % (1 << 31) * 64));
        assert_eq!(brought, demands);
    }

    #[test]
    fn clusters_are_met_in_few_demands_and_no_more_is_wasted_than_used() {
        let mut windows = Windows::new(ReadAhead::Adaptive);
        let mut seed = 7;
        let clusters: Vec<(u64, u64)> = (0..2000)
            .map(|_| (random(&mut seed) % 100_000 * 100, 1 + random(&mut seed) % 64))
            .collect();
        let used: u64 = clusters.iter().map(|(_, pages)| pages).sum();
        let (brought, demands) =
            touch(&mut windows, clusters.iter().flat_map(|&(at, pages)| at..at + pages));
        assert!(demands * 10 < used, "{demands} demands for {used} pages");
        assert!(brought < 2 * used, "{brought} brought, {used} used");
    }
}
