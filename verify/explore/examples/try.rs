use polder_explore::*;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    for setup in polder::all() {
        if args.len() > 1 && args[1] != setup.name {
            continue;
        }
        let secs: u64 = args.get(2).map_or(30, |s| s.parse().unwrap());
        let start = polder::World::new(&setup);
        let t = std::time::Instant::now();
        let mut go = |_s: usize, _t: u64| t.elapsed().as_secs() < secs;
        let out = if setup.exhaustive {
            search::exhaust(&start, &mut go)
        } else {
            search::wander(&start, 1, 4, &mut go)
        };
        let e = t.elapsed().as_secs_f64();
        let poss = search::possible(&start);
        let cov = out.overlaps.intersection(&poss).count();
        println!(
            "{}: {} states {} steps depth {} {:.1}s {:.0} states/s {:.0} steps/s complete {} overlaps {}/{} +{}",
            setup.name,
            out.states,
            out.steps,
            out.depth,
            e,
            out.states as f64 / e,
            out.steps as f64 / e,
            out.complete,
            cov,
            poss.len(),
            out.overlaps.len() - cov
        );
        if let Some(f) = &out.finding {
            println!("  {}", f.violation);
            let s = search::shortest(&start, 3_000_000, &mut |_, _| true);
            let f = s.finding.unwrap_or_else(|| search::shrink(&start, f));
            println!("  {} in {} moves, {} states", f.violation, f.moves.len(), s.states);
            for l in search::tell(&start, &f) {
                println!("    {l}");
            }
        }
    }
}
