use polder_explore::*;
fn main() {
    let only = std::env::args().nth(1);
    for bug in planted::ALL {
        if only.as_ref().is_some_and(|o| o != bug.name) { continue; }
        let setup = polder::all().into_iter().find(|s| s.name == bug.config).unwrap().with(bug.bug);
        let start = polder::World::new(&setup);
        let t = std::time::Instant::now();
        let s = search::shortest(&start, 2_000_000, &mut |_, _| true);
        match s.finding {
            Some(f) => {
                println!("{:24} FOUND {} states, {} moves, {:.1}s: {}", bug.name, s.states, f.moves.len(), t.elapsed().as_secs_f64(), f.violation);
                if only.is_some() { for l in search::tell(&start, &f) { println!("    {l}"); } }
            }
            None => println!("{:24} NOT FOUND {} states complete {}", bug.name, s.states, s.complete),
        }
    }
}
