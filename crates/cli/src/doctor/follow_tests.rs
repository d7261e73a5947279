//! What follows, on machines that are made up.

use std::io;

use super::super::facts::Watch;
use super::super::facts::tests::{bare, made_up};
use super::super::machine::Parameters;
use super::*;

const ALL: [(&str, i32); 7] = [
    ("USER_MEMORY2", 1),
    ("GUEST_MEMFD", 1),
    ("GUEST_MEMFD_FLAGS", 3),
    ("MEMORY_ATTRIBUTES", 8),
    ("MEMORY_FAULT_INFO", 1),
    ("PRE_FAULT_MEMORY", 1),
    ("EXIT_HYPERCALL", 1 << 12),
];

fn host<'a>(hosts: &'a [HostFindings], name: &str) -> &'a HostFindings {
    hosts.iter().find(|host| host.host == name).unwrap()
}

fn finding<'a>(host: &'a HostFindings, name: &str) -> &'a Finding {
    host.needs.iter().chain(&host.features).find(|finding| finding.name == name).unwrap()
}

#[test]
fn the_machine_is_usable_where_nothing_is() {
    let hosts = hosts(&bare());
    assert!(host(&hosts, "machine").usable);
    let memfd = host(&hosts, "memfd");
    assert!(!memfd.usable && memfd.why.contains("kvm, userfaultfd"), "{memfd:?}");
    assert_eq!(finding(memfd, "hypercalls").ok, None);
    assert_eq!(finding(host(&hosts, "guest_memfd"), "private pages").ok, None);
}

#[test]
fn whatever_is_missing_has_a_way_out() {
    let old = made_up("6.1.0", &[], Parameters::default());
    for facts in [bare(), old, made_up("6.18.1", &[], Parameters::default())] {
        for host in hosts(&facts) {
            for finding in host.needs.iter().chain(&host.features) {
                let way_out = finding.way_out.as_deref().unwrap_or_default();
                assert_eq!(finding.ok == Some(false), !way_out.is_empty(), "{finding:?}");
            }
        }
    }
}

#[test]
fn a_kernel_s_version_is_named_where_it_would_help_and_paging_where_not() {
    let old = hosts(&made_up("6.1.0", &[], Parameters::default()));
    let private = finding(host(&old, "guest_memfd"), "private pages");
    assert!(private.way_out.as_deref().unwrap().contains("Linux 6.8"), "{private:?}");
    let shadow = hosts(&made_up("6.18.0", &[], Parameters::default()));
    let guest_memfd = host(&shadow, "guest_memfd");
    for name in ["private pages", "prefault"] {
        assert_eq!(finding(guest_memfd, name).way_out.as_deref(), Some(ways_out::TDP));
    }
}

#[test]
fn a_kernel_with_all_of_it_has_private_pages() {
    let hosts = hosts(&made_up("7.3.4", &ALL, Parameters::default()));
    let guest_memfd = host(&hosts, "guest_memfd");
    assert!(guest_memfd.usable, "{guest_memfd:?}");
    assert!(guest_memfd.features.iter().all(|feature| feature.ok == Some(true)));
    // Offered, and dead when tried.
    assert_eq!(finding(host(&hosts, "memfd"), "hypercalls").ok, Some(false));
}

#[test]
fn a_userfaultfd_for_one_s_own_touches_is_none_for_guests() {
    let mut facts = made_up("6.18.0", &ALL, Parameters::default());
    let features = vec!["MISSING_SHMEM"];
    let way = Err(io::Error::from_raw_os_error(1));
    facts.userfault = Ok(Watch { way, features, nameless: 0 });
    facts.memfd = Err(RunError::Panicked);
    let hosts = hosts(&facts);
    let memfd = host(&hosts, "memfd");
    assert!(finding(memfd, "userfaultfd").what.contains("own touches"));
    assert_eq!(finding(memfd, "userfaultfd features").what, "lacks MINOR_SHMEM, POISON");
    assert!(memfd.needs.iter().all(|need| need.name != "trial"), "{memfd:?}");
}

#[test]
fn a_trial_that_fails_is_told_where_nothing_else_explains_it() {
    let mut facts = made_up("6.18.0", &ALL, Parameters::default());
    facts.memfd = Err(RunError::Panicked);
    let hosts = hosts(&facts);
    let memfd = host(&hosts, "memfd");
    assert!(memfd.why.starts_with("tried, and failed: a thread"), "{memfd:?}");
    assert_eq!(finding(memfd, "trial").ok, Some(false));
}

#[test]
fn huge_pages_that_are_promised_are_not_free() {
    for (free, reserved, ok) in [(4, 0, true), (4, 3, true), (4, 4, false), (0, 0, false)] {
        let pool =
            Pool { bytes: 2 << 20, total: Some(4), free: Some(free), reserved: Some(reserved) };
        let found = huge_pages(&pool);
        assert_eq!(found.ok, Some(ok), "{found:?}");
        if let Some(way_out) = found.way_out {
            assert!(
                way_out.starts_with("echo 68 | sudo tee /sys/kernel/mm/hugepages/hugepages-2048kB")
            );
        }
    }
}

#[test]
fn thp_for_shmem_is_decided_by_two_files() {
    for (all, of_size, ok, file) in [
        ("never", None, false, "transparent_hugepage/shmem_enabled"),
        ("never", Some("inherit"), false, "transparent_hugepage/shmem_enabled"),
        ("advise", Some("inherit"), true, ""),
        ("never", Some("advise"), true, ""),
        ("advise", Some("never"), false, "hugepages-2048kB/shmem_enabled"),
        ("deny", Some("always"), false, "transparent_hugepage/shmem_enabled"),
    ] {
        let mut facts = bare();
        facts.machine.shmem = Some(all.into());
        facts.machine.shmem_sizes =
            of_size.map(|choice| (2 << 20, choice.to_owned())).into_iter().collect();
        let found = shmem_thp(&facts);
        assert_eq!(found.ok, Some(ok), "{all} {of_size:?}");
        assert!(found.way_out.unwrap_or_default().ends_with(file), "{all} {of_size:?}");
    }
}
