//! The archive that the lab's kernel starts from: `cpio`'s format `newc`, as the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes it.

/// The archive, as it grows.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
/// The entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

impl Archive {
    /// A folder; those above it come first.
    pub(super) fn folder(self, path: &str) -> Result<Self, String> {
        self.entry(path, DIRECTORY, &[])
    }

    /// A file that is read.
    pub(super) fn file(self, path: &str, contents: &[u8]) -> Result<Self, String> {
        self.entry(path, FILE, contents)
    }

    /// A file that is run.
    pub(super) fn program(self, path: &str, contents: &[u8]) -> Result<Self, String> {
        self.entry(path, PROGRAM, contents)
    }

    /// The whole archive.
    pub(super) fn finish(self) -> Result<Vec<u8>, String> {
        Ok(self.entry(TRAILER, 0, &[])?.bytes)
    }

    fn entry(mut self, path: &str, mode: u32, contents: &[u8]) -> Result<Self, String> {
        let size = u32::try_from(contents.len())
            .map_err(|_| format!("{path}: 4 GiB and more don't fit into an initramfs"))?;
        let name = u32::try_from(path.len() + 1).map_err(|_| format!("{path}: too long"))?;
        self.entries += 1;
        // inode, mode, owner, group, links, time, size, device (2), device named (2), length of
        // the name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(contents);
        self.align();
        Ok(self)
    }

    /// Names and contents end at a multiple of four.
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive's entries, read by the format's rules: path, mode, contents.
    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let digits = str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let (name, size) = (field(11) as usize, field(6) as usize);
            let path = String::from_utf8(bytes[110..110 + name - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name - 1], 0);
            let start = (110 + name).next_multiple_of(4);
            let contents = bytes[start..start + size].to_vec();
            entries.push((path.clone(), field(1), contents));
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if path == TRAILER {
                assert!(bytes.is_empty());
                return entries;
            }
        }
    }

    #[test]
    fn what_is_written_is_read_again_whatever_its_length() {
        let contents: Vec<Vec<u8>> = (0..9).map(|len| vec![b'x'; len]).collect();
        let mut archive = Archive::default().folder("bin").unwrap();
        for (n, contents) in contents.iter().enumerate() {
            archive = archive.program(&format!("bin/{}", "p".repeat(n + 1)), contents).unwrap();
        }
        let read = entries(&archive.file("plain", b"text").unwrap().finish().unwrap());
        assert_eq!(read[0], ("bin".to_owned(), DIRECTORY, Vec::new()));
        for (n, contents) in contents.into_iter().enumerate() {
            assert_eq!(read[n + 1], (format!("bin/{}", "p".repeat(n + 1)), PROGRAM, contents));
        }
        assert_eq!(read[10], ("plain".to_owned(), FILE, b"text".to_vec()));
        assert_eq!((read[11].0.as_str(), read.len()), (TRAILER, 12));
    }

    #[test]
    fn inodes_differ_so_that_nothing_is_taken_for_a_link() {
        let archive = Archive::default().file("a", b"1").unwrap().file("b", b"2").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(&bytes[6..14], b"00000001");
        assert_eq!(&bytes[116 + 6..116 + 14], b"00000002");
    }
}
