//! Texts of the kernel, read into numbers and words.

/// The version in a kernel's release: `6.18.44-fc` is 6.18.
pub(super) fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The value of the first line `name : value`.
pub(super) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_prefix(':'))?;
    Some(value.trim()).filter(|value| !value.is_empty())
}

/// A number of KiB in a line of `/proc/meminfo`, in bytes.
pub(super) fn kib_field(text: &str, name: &str) -> Option<u64> {
    let kib: u64 = field(text, name)?.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A soft limit of `/proc/self/limits`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Limit {
    Unlimited,
    At(u64),
}

/// The soft limit in the line of this name of `/proc/self/limits`.
pub(super) fn limit(text: &str, name: &str) -> Option<Limit> {
    let values = text.lines().find_map(|line| line.strip_prefix(name))?;
    match values.split_whitespace().next()? {
        "unlimited" => Some(Limit::Unlimited),
        number => number.parse().ok().map(Limit::At),
    }
}

/// The word in brackets of a file that lists choices: `always advise [never]`.
pub(super) fn chosen(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0)
}

/// The bytes in a folder's name `hugepages-2048kB`.
pub(super) fn page_size(folder: &str) -> Option<u64> {
    let kib: u64 = folder.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

/// A module's parameter of two values.
pub(super) fn switch(text: &str) -> Option<bool> {
    match text.trim() {
        "Y" | "1" => Some(true),
        "N" | "0" => Some(false),
        _ => None,
    }
}

/// The name that `/etc/group` has for a group.
pub(super) fn group(text: &str, gid: u32) -> Option<&str> {
    text.lines().find_map(|line| {
        let mut parts = line.split(':');
        let name = parts.next()?;
        (parts.nth(1)?.parse() == Ok(gid)).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_s_version_is_the_first_two_numbers_of_its_release() {
        for (release, expected) in [
            ("6.18.44-fc-v470\n", Some((6, 18))),
            ("7.3", Some((7, 3))),
            ("6.1-rc3", Some((6, 1))),
            ("6", None),
            ("six.one", None),
            ("99999999999.1", None),
            ("", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text =
            "model\t\t: 1\nmodel name\t: Some CPU: fast\nflags\t:\nMemFree:   12 kB\nBad: x kB\n";
        assert_eq!(field(text, "model name"), Some("Some CPU: fast"));
        assert_eq!(field(text, "model"), Some("1"));
        assert_eq!((field(text, "flags"), field(text, "bogomips")), (None, None));
        assert_eq!(kib_field(text, "MemFree"), Some(12 << 10));
        assert_eq!((kib_field(text, "Bad"), kib_field(text, "model")), (None, None));
    }

    #[test]
    fn limits_are_read() {
        let text = "Limit            Soft Limit   Hard Limit  Units\n\
                    Max locked memory  8388608    unlimited   bytes\n\
                    Max address space  unlimited  unlimited   bytes\n\
                    Max open files     \n";
        assert_eq!(limit(text, "Max locked memory"), Some(Limit::At(8 << 20)));
        assert_eq!(limit(text, "Max address space"), Some(Limit::Unlimited));
        assert_eq!((limit(text, "Max open files"), limit("", "Max open files")), (None, None));
    }

    #[test]
    fn words_and_numbers_of_sysfs_are_read() {
        assert_eq!(chosen("always inherit [never] force\n"), Some("never"));
        assert_eq!((chosen("never"), chosen("[never"), chosen("")), (None, None, None));
        assert_eq!(page_size("hugepages-1048576kB"), Some(1 << 30));
        assert_eq!((page_size("hugepages-kB"), page_size("defrag")), (None, None));
        assert_eq!(page_size("hugepages-18446744073709551615kB"), None);
        assert_eq!((switch("Y\n"), switch("0"), switch("auto")), (Some(true), Some(false), None));
    }

    #[test]
    fn groups_have_names() {
        let text = "root:x:0:\nkvm:x:104:somebody\nbad\n";
        assert_eq!((group(text, 104), group(text, 0)), (Some("kvm"), Some("root")));
        assert_eq!((group(text, 7), group("", 0)), (None, None));
    }
}
