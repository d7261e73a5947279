//! Timing two things in turns.

use std::time::{Duration, Instant};

use crate::Costs;

/// The turns of which the median is told; odd.
pub(crate) const TURNS: usize = 11;

/// Something to time: it does its operation this many times.
pub(crate) type Work<'a> = &'a mut dyn FnMut(u32);

/// The nanoseconds an operation takes, of two works that take turns of about `turn` each.
pub(crate) fn compare(turn: Duration, baseline: Work, polder: Work) -> Costs {
    let (a, b) = (count_for(turn, baseline), count_for(turn, polder));
    let (mut of_a, mut of_b) = ([0.0; TURNS], [0.0; TURNS]);
    for (of_a, of_b) in of_a.iter_mut().zip(&mut of_b) {
        *of_a = nanoseconds_each(baseline, a);
        *of_b = nanoseconds_each(polder, b);
    }
    Costs { baseline: median(of_a), polder: median(of_b) }
}

/// The nanoseconds of two works that take turns, each of which sees to its own preparation and says
/// what its operation took.
pub(crate) fn alternate<E>(
    mut baseline: impl FnMut() -> Result<f64, E>,
    mut polder: impl FnMut() -> Result<f64, E>,
) -> Result<Costs, E> {
    // Once to warm up.
    baseline()?;
    polder()?;
    let (mut of_a, mut of_b) = ([0.0; TURNS], [0.0; TURNS]);
    for (of_a, of_b) in of_a.iter_mut().zip(&mut of_b) {
        *of_a = baseline()?;
        *of_b = polder()?;
    }
    Ok(Costs { baseline: median(of_a), polder: median(of_b) })
}

/// How many operations take about `turn`. Finding out also warms up.
fn count_for(turn: Duration, work: Work) -> u32 {
    let mut count: u32 = 1;
    loop {
        let took = time(|| work(count));
        if took >= turn / 2 || count > u32::MAX / 2 {
            return count;
        }
        count *= 2;
    }
}

fn nanoseconds_each(work: Work, count: u32) -> f64 {
    time(|| work(count)).as_secs_f64() * 1e9 / f64::from(count)
}

/// How long something takes.
pub(crate) fn time(work: impl FnOnce()) -> Duration {
    let start = now();
    work();
    start.elapsed()
}

#[expect(clippy::disallowed_methods, reason = "a bench is about time")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// The median of any number of values.
pub(crate) fn median_of(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    quantile(&mut values, 50)
}

/// Median, the value that 99% are not above, and the largest, in words.
pub(crate) fn quantiles(mut values: Vec<f64>) -> String {
    let [p50, p99, most] = [50, 99, 100].map(|percent| quantile(&mut values, percent));
    format!("p50 {p50:.1}, p99 {p99:.1}, max {most:.1}")
}

fn quantile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() * percent).div_ceil(100).saturating_sub(1);
    values.get(at).copied().unwrap_or(f64::NAN)
}

fn median(values: [f64; TURNS]) -> f64 {
    median_of(&values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_does_not_mind_an_outlier() {
        let mut values = [2.0; TURNS];
        values[0] = 1e9;
        assert!((median(values) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(quantiles(values), "p50 100.0, p99 198.0, max 200.0");
        assert_eq!(quantiles(vec![7.0]), "p50 7.0, p99 7.0, max 7.0");
    }

    #[test]
    fn works_take_turns() {
        let order = std::cell::RefCell::new(Vec::new());
        let slow = |name| {
            let order = &order;
            move |_| {
                order.borrow_mut().push(name);
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let costs = compare(Duration::from_millis(2), &mut slow('a'), &mut slow('b'));
        assert!(costs.baseline > 1e6 && costs.polder > 1e6);
        let order = order.borrow();
        assert!(order.ends_with(&['a', 'b', 'a', 'b', 'a', 'b']), "{order:?}");
    }
}
