//! Requests, sensible and hostile.

use polder_units::Gfn;
use proptest::prelude::*;

use super::*;

const PAGE: u64 = PAGE_SIZE;

#[test]
fn a_machine_check_has_an_address_and_a_status() {
    let parsed = Request::parse(number::MACHINE_CHECK, [0x5000, 7, 0, 0, 0]);
    assert_eq!(parsed, Ok(Request::MachineCheck { gpa: Gpa::new(0x5000), status: 7 }));
}

#[test]
fn sensible_registers_are_requests() {
    let pages = GfnRange::between(2, 5).unwrap();
    let to = Visibility::Private;
    for (number, args, request) in [
        (12, [2 * PAGE, 3, 0x10, 0, 0], Request::Convert { pages, to }),
        (12, [2 * PAGE, 3, 0x11, 0, 0], Request::Convert { pages, to }),
        (12, [2 * PAGE, 3, 0, 0, 0], Request::Convert { pages, to: Visibility::Shared }),
        (0x100, [2 * PAGE, 3, 1, 0, 0], Request::Probe { pages, expect: HostAccess::Readable }),
        (0x101, [0x1008, 0, 0, 0, 0], Request::Doorbell { request: Gpa::new(0x1008) }),
        (0x102, [7, 0, 0, 0, 0], Request::Done { checks_passed: 7 }),
    ] {
        assert_eq!(Request::parse(number, args), Ok(request));
    }
}

#[test]
fn hostile_registers_are_refused_by_what_is_wrong_with_them() {
    let range = RequestError::Range;
    let top = !(PAGE - 1);
    for (number, args, error) in [
        (12, [PAGE + 8, 1, 0, 0, 0], range(RangeError::Unaligned { value: PAGE + 8 })),
        (12, [PAGE, 0, 0, 0, 0], range(RangeError::Empty)),
        (12, [top, 2, 0, 0, 0], range(RangeError::Overflow { start: top })),
        (12, [0, 1 << 52, 0, 0, 0], RequestError::Pages { pages: 1 << 52 }),
        (12, [PAGE, u64::MAX, 0, 0, 0], RequestError::Pages { pages: u64::MAX }),
        (12, [PAGE, 1, 0x20, 0, 0], RequestError::Attributes { attributes: 0x20 }),
        (12, [PAGE, 1, 3, 0, 0], RequestError::Attributes { attributes: 3 }),
        (0x100, [PAGE, 1, 2, 0, 0], RequestError::Expectation { expect: 2 }),
        (0x101, [0x1004, 0, 0, 0, 0], RequestError::Doorbell { gpa: Gpa::new(0x1004) }),
        (0x1_0000_000c, [PAGE, 1, 0, 0, 0], RequestError::Number { number: 0x1_0000_000c }),
    ] {
        assert_eq!(Request::parse(number, args), Err(error));
    }
}

#[test]
fn only_one_read_of_four_bytes_at_the_port_is_a_request() {
    let regs = kvm_regs { rax: 12, rbx: PAGE, rcx: 1, ..Default::default() };
    let page = GfnRange::one(Gfn::from(1));
    let request = Request::Convert { pages: page, to: Visibility::Shared };
    assert_eq!(Request::from_port((true, PORT, 4), &regs), Ok(request));
    for access in [(false, PORT, 4), (true, 0x60, 4), (true, PORT, 1), (true, PORT, 8)] {
        let error = Request::from_port(access, &regs).unwrap_err();
        assert!(matches!(error, RequestError::Access { .. }), "{error}");
        assert_eq!(error.errno(), -38);
    }
    assert_eq!(Request::from_hypercall(12, [PAGE, 1, 0, 0, 0, 0]), Ok(request));
    assert_eq!(Request::from_hypercall(0x102, [0; 6]), Err(RequestError::Number { number: 0x102 }));
}

#[test]
fn a_device_request_parses_as_it_is_written() {
    let [source, destination] = [0x1000, 0x2008].map(Gpa::new);
    let request = DeviceRequest { id: 9, source, len: 0x1010, destination };
    assert_eq!(DeviceRequest::parse(request.words()), Ok(request));
    for len in [0, 4, DEVICE_LEN_MAX + 8] {
        let words = [9, 0x1000, len, 0x2000, 1];
        assert_eq!(DeviceRequest::parse(words), Err(DeviceRequestError::Len { id: 9, len }));
    }
    for gpa in [0x1004, u64::MAX - 7] {
        let error = DeviceRequest::parse([9, 0x1000, 16, gpa, 1]);
        let gpa = Gpa::new(gpa);
        assert_eq!(error, Err(DeviceRequestError::Address { id: 9, gpa, len: 16 }));
    }
}

proptest! {
    #[test]
    fn whatever_comes_is_a_request_or_an_error(
        number in prop_oneof![Just(12u64), 0xfeu64..0x108, any::<u64>()],
        args: [u64; 5],
        shift in 0u32..64,
    ) {
        match Request::parse(number, args.map(|arg| arg >> shift)) {
            Ok(Request::Convert { pages, .. } | Request::Probe { pages, .. }) => {
                prop_assert!(pages.count().get() > 0);
            }
            Ok(_) => {}
            Err(error) => prop_assert!(error.errno() < 0),
        }
        let _ = DeviceRequest::parse(args);
    }
}
