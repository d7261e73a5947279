//! Ciphertext: who reads what.

use polder_machine::{Contents, RmpUpdate, Side};
use polder_units::Level;

use crate::{LARGE, Rig, asid, gfn, large, page, pages, pfn};

const SECRET: u64 = 0x5ec2e7;

/// A guest that wrote `SECRET` at gfn 1.
fn with_secret(contents: Contents) -> Rig {
    let mut rig = Rig::with(contents);
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    rig.map(0, Level::Size2M);
    rig.pvalidate(0, LARGE).unwrap().unwrap();
    rig.write(1, Side::Private, SECRET).unwrap();
    rig
}

fn to_shared(rig: &mut Rig) {
    rig.machine.tdp_zap(rig.vm, crate::gfns(0, 4)).unwrap();
    rig.machine.rmpupdate(pfn(0), RmpUpdate::shared(LARGE)).unwrap();
    rig.map(0, Level::Size2M);
}

fn to_private(rig: &mut Rig) {
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    rig.machine.flush_vm(rig.vm, crate::gfns(0, 4)).unwrap();
    rig.pvalidate(0, LARGE).unwrap().unwrap();
}

#[test]
fn the_guest_reads_what_it_wrote_and_the_host_reads_other_bytes() {
    for contents in [Contents::Symbolic, Contents::Bytes] {
        let mut rig = with_secret(contents);
        assert_eq!(rig.read(1, Side::Private), Ok(SECRET));
        assert_ne!(rig.host_word(1), SECRET);
        assert_ne!(rig.read(1, Side::Shared), Ok(SECRET));
        let mut vcpu = rig.machine.vcpu(rig.vcpus[1]).unwrap();
        let mut bytes = [0; 4100];
        let across = polder_units::Gpa::new(0x1ffe);
        vcpu.write(across, Side::Private, &[7; 4100]).unwrap();
        vcpu.read(across, Side::Private, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 4100], "over three pages, at odd offsets");
    }
}

#[test]
fn ciphertext_is_the_same_in_every_run() {
    let [first, second] = [(); 2].map(|()| with_secret(Contents::Symbolic).host_word(1));
    assert_eq!(first, second);
}

#[test]
fn a_page_made_shared_is_ciphertext_to_all() {
    let mut rig = with_secret(Contents::Symbolic);
    to_shared(&mut rig);
    assert_ne!(rig.read(1, Side::Shared), Ok(SECRET));
    assert_eq!(rig.read(1, Side::Shared), Ok(rig.host_word(1)));
}

#[test]
fn a_page_made_private_is_garbage_until_it_is_written() {
    let mut rig = with_secret(Contents::Bytes);
    to_shared(&mut rig);
    rig.write(1, Side::Shared, 7).unwrap();
    assert_eq!(rig.host_word(1), 7);
    to_private(&mut rig);
    let garbage = rig.read(1, Side::Private).unwrap();
    assert!(garbage != 7 && garbage != SECRET && garbage != 0);
    rig.write(1, Side::Private, SECRET).unwrap();
    assert_eq!(rig.read(1, Side::Private), Ok(SECRET));
}

#[test]
fn the_rmp_moves_no_byte() {
    let mut rig = with_secret(Contents::Symbolic);
    let before = rig.host_word(1);
    to_shared(&mut rig);
    assert_eq!(rig.host_word(1), before);
    to_private(&mut rig);
    assert_eq!(rig.read(1, Side::Private), Ok(SECRET), "nobody wrote, so it is still there");
}

#[test]
fn another_frame_and_the_next_guest_of_the_same_asid_read_garbage() {
    let mut rig = with_secret(Contents::Symbolic);
    let stored = rig.host_word(1).to_le_bytes();
    rig.machine.object_write(rig.object, 5 << 12, &stored).unwrap();
    rig.machine.rmpupdate(pfn(4), large(4)).unwrap();
    rig.map(4, Level::Size2M);
    rig.pvalidate(4, LARGE).unwrap().unwrap();
    assert_ne!(rig.read(5, Side::Private), Ok(SECRET), "ciphertext that was moved");

    rig.machine.destroy_vm(rig.vm).unwrap();
    for at in [0, 4] {
        rig.machine.rmpupdate(pfn(at), RmpUpdate::shared(LARGE)).unwrap();
    }
    rig.vm = rig.machine.create_snp_vm(asid(1)).unwrap();
    rig.machine.bind(rig.vm, gfn(0), rig.object, pages(0, 8)).unwrap();
    rig.vcpus = [(); 2].map(|()| rig.machine.add_vcpu(rig.vm).unwrap());
    rig.map(0, Level::Size2M);
    to_private(&mut rig);
    assert_ne!(rig.read(1, Side::Private), Ok(SECRET), "another key");
}

#[test]
fn memory_that_was_private_comes_back_as_zeros_when_it_is_allocated_again() {
    let mut rig = with_secret(Contents::Bytes);
    to_shared(&mut rig);
    rig.machine.tdp_zap(rig.vm, crate::gfns(0, 4)).unwrap();
    rig.machine.punch(rig.object, pages(0, 4), None).unwrap();
    rig.machine.allocate(rig.object, page(0), Level::Size2M).unwrap();
    assert_eq!(rig.host_word(1), 0);
}
