//! Peers of any kind.

use std::sync::atomic::{AtomicU32, Ordering};

use polder::units::{Gfn, PageCount, PageRange};
use polder::{HostKind, Slot, Vm};
use proptest::prelude::*;

use super::*;

const PAGES: u32 = 16;
/// What a look at the guest lets pass.
const LOOK: Duration = Duration::from_millis(50);

const ACTS_MAX: usize = 60;

/// What a peer does, or the run.
#[derive(Clone, Debug)]
enum Act {
    Connect,
    Send(usize, Vec<u8>),
    Read(usize, usize),
    /// Says that nothing more comes.
    Shut(usize),
    Leave(usize),
    Serve,
    /// Nobody looks for a while.
    Pass(u64),
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..2 * QUESTION),
        "explain (page|gpa) [0-9]{1,22}\n?".prop_map(String::into_bytes),
        "(expl|ain p|age |gpa |1|7|\n| ){1,4}".prop_map(String::into_bytes),
        (1..=4096_usize).prop_map(|count| vec![b'x'; count]),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::Connect),
        5 => (any::<usize>(), bytes()).prop_map(|(peer, bytes)| Act::Send(peer, bytes)),
        2 => (any::<usize>(), 1..300_usize).prop_map(|(peer, count)| Act::Read(peer, count)),
        1 => any::<usize>().prop_map(Act::Shut),
        1 => any::<usize>().prop_map(Act::Leave),
        4 => Just(Act::Serve),
        1 => (0..3000_u64).prop_map(Act::Pass),
    ]
}

/// A run with its clock.
struct Run {
    control: Control,
    memory: Memory,
    vm: VmId,
    now: Duration,
}

impl Run {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("polder-control-{}-{number}.sock", std::process::id());
        let control = Control::listen_at(std::env::temp_dir().join(name)).expect("a socket");
        let memory = Memory::builder(PageCount::from(PAGES)).host(HostKind::Machine);
        let memory = memory.build().expect("it is simulated");
        let vm = memory.attach(Vm::Machine).expect("it is simulated");
        let all = PageRange::between(0, PAGES.into()).expect("not empty");
        memory.bind(vm, Slot(0), Gfn::from(0), all).expect("nothing else is bound");
        Self { control, memory, vm, now: Duration::ZERO }
    }

    fn serve(&mut self) {
        self.now += LOOK;
        self.control.serve(&self.memory, self.vm, self.now);
        assert!(self.control.peers.len() <= PEERS);
        for peer in &self.control.peers {
            assert!(peer.asked.len() <= 2 * QUESTION && peer.sent <= ANSWER_MOST);
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.control.path).expect("it listens");
        stream.set_nonblocking(true).expect("a socket can be");
        stream
    }

    /// What a peer is answered who asks as he should.
    fn ask(&mut self, line: &str) -> Value {
        let mut peer = self.connect();
        peer.write_all(line.as_bytes()).expect("a few bytes");
        (0..4).for_each(|_| self.serve());
        let mut answer = Vec::new();
        peer.read_to_end(&mut answer).expect("it was closed");
        serde_json::from_slice(&answer).expect("one object")
    }
}

/// More than an answer takes.
const ANSWER_MOST: usize = 64 << 10;

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whatever peers do and leave undone, and however many there are: nothing waits for them,
    /// and once their time is over who asks as he should is answered.
    #[test]
    fn peers_of_any_kind_are_borne(acts in prop::collection::vec(act(), 0..ACTS_MAX)) {
        let mut run = Run::new();
        let mut peers: Vec<UnixStream> = Vec::new();
        for act in acts {
            let some = peers.len();
            match act {
                // As many as the kernel lets wait to be let in: the next would wait himself.
                Act::Connect => peers.push(run.connect()),
                Act::Serve => run.serve(),
                Act::Pass(time) => run.now += Duration::from_millis(time),
                _ if some == 0 => {}
                Act::Send(peer, bytes) => {
                    let _ = peers[peer % some].write(&bytes);
                }
                Act::Read(peer, count) => {
                    let _ = peers[peer % some].read(&mut vec![0; count]);
                }
                Act::Shut(peer) => {
                    let _ = peers[peer % some].shutdown(std::net::Shutdown::Write);
                }
                Act::Leave(peer) => drop(peers.swap_remove(peer % some)),
            }
        }
        // All are let in, and their time passes.
        for _ in 0..=ACTS_MAX / AT_ONCE {
            run.serve();
        }
        run.now += PATIENCE + LOOK;
        run.serve();
        prop_assert_eq!(run.control.peers.len(), 0);
        prop_assert_eq!(&run.ask("explain page 3\n")["explanation"]["page"], 3);
        prop_assert_eq!(&run.ask("explain gpa 8192\n")["explanation"]["page"], 2);
        let beyond = run.ask("explain page 16\n");
        prop_assert!(beyond["error"]["what"].is_string(), "{}", beyond);
    }

    #[test]
    fn a_question_is_read_as_it_was_written_or_not_at_all(bytes in bytes(), page in any::<u64>()) {
        if let Some(question) = Question::parse(&bytes) {
            let line = question.to_line();
            prop_assert_eq!(Question::parse(line.trim_end().as_bytes()), Some(question));
        }
        let gpa = Question::Gpa(Gpa::new(page));
        prop_assert_eq!(Question::parse(gpa.to_line().trim_end().as_bytes()), Some(gpa));
        prop_assert!(gpa.to_line().len() <= QUESTION);
    }
}
