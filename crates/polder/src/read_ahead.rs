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
//!
//! Where pages come together only, as huge ones do, all of this counts in those. Of huge pages of
//! 2M a stream that was continued gets the next one, too, which another thread brings meanwhile.

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

/// A [`ReadAhead`] at work. It counts in granules: what comes together.
#[derive(Debug)]
pub(crate) struct Windows {
    kind: ReadAhead,
    /// The most of a window, of an initial one, and of what a stream may pass over.
    most: u64,
    most_initial: u64,
    slack: u64,
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
    /// Of granules of so many pages.
    pub(crate) fn new(kind: ReadAhead, granule: u64) -> Self {
        let of = |pages: u64| (pages / granule).max(1);
        let most = of(MOST).max(if granule <= MOST { 2 } else { 1 });
        let (initial, most_initial) = (of(INITIAL), of(MOST_INITIAL));
        let slack = SLACK / granule;
        Self { kind, most, most_initial, slack, streams: Vec::new(), initial, score: 0 }
    }

    /// How many to bring, from `page` on, now that it is asked for: 1 at least.
    pub(crate) fn window(&mut self, page: u64) -> u64 {
        if self.kind == ReadAhead::Off {
            return 1;
        }
        let met = |stream: &Stream| (stream.next..=stream.next + self.slack).contains(&page);
        let stream = match self.streams.iter().position(met) {
            Some(at) => {
                let stream = self.streams.remove(at);
                if !stream.continued {
                    self.learn(CONTINUED);
                }
                let window = (2 * stream.window).min(self.most);
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
            self.initial = (2 * self.initial).min(self.most_initial);
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
        assert_eq!(touch(&mut Windows::new(ReadAhead::Off, 1), 0..100), (100, 100));
    }

    #[test]
    fn who_goes_straight_on_asks_seldom() {
        let (brought, demands) = touch(&mut Windows::new(ReadAhead::Adaptive, 1), 0..65536);
        assert!(demands < 160, "{demands}");
        assert!(brought <= 65536 + MOST, "{brought}");
    }

    #[test]
    fn of_huge_pages_a_stream_gets_the_next_one_too_and_of_the_largest_none() {
        let mut windows = Windows::new(ReadAhead::Adaptive, 512);
        assert_eq!([0, 1, 3, 5].map(|page| windows.window(page)), [1, 2, 2, 2]);
        assert_eq!([90, 70, 50].map(|page| windows.window(page)), [1; 3], "no stream");
        let mut windows = Windows::new(ReadAhead::Adaptive, 1 << 18);
        assert_eq!([0, 1, 2].map(|page| windows.window(page)), [1; 3]);
    }

    #[test]
    fn several_who_go_straight_on_are_told_apart() {
        let pages = (0..4096).flat_map(|step| (0..8).map(move |who| who * 1_000_000 + step));
        let (_, demands) = touch(&mut Windows::new(ReadAhead::Adaptive, 1), pages);
        assert!(demands < 8 * 20, "{demands}");
    }

    #[test]
    fn random_demands_soon_waste_nothing() {
        let mut windows = Windows::new(ReadAhead::Adaptive, 1);
        let mut seed = 1;
        touch(&mut windows, (0..200).map(|_| random(&mut seed) % (1 << 31) * 64));
        let (brought, demands) =
            touch(&mut windows, (0..1000).map(|_| random(&mut seed) % (1 << 31) * 64));
        assert_eq!(brought, demands);
    }

    #[test]
    fn clusters_are_met_in_few_demands_and_no_more_is_wasted_than_used() {
        let mut windows = Windows::new(ReadAhead::Adaptive, 1);
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
