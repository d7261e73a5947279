//! Memory of huge pages, on this kernel's and on the simulated machine's.

mod hugetlb;
mod hugetlb_pool;
mod machine;
mod machine_pool;
mod transparent;

use polder::units::{PageCount, PageRange};
use polder::{Contents, Error, HostKind, Memory, OnBusy, PageSize, Platform, Visibility};

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

fn to(memory: &Memory, range: PageRange, visibility: Visibility) -> Result<PageCount, Error> {
    memory.convert(range, visibility, Contents::Preserve, OnBusy::Wait)
}

fn first_byte(memory: &Memory, page: u64) -> Result<u8, Error> {
    let mut byte = [0];
    memory.host_view().touch_read(page * 4096, &mut byte)?;
    Ok(byte[0])
}

/// Memory of `count` huge pages on the simulated machine.
fn simulated(size: PageSize, count: u32, platform: Platform) -> Memory {
    let pages = if size == PageSize::Huge1G { 512 * 512 } else { 512 };
    let builder = Memory::builder(PageCount::from(count * pages)).host(HostKind::Machine);
    builder.platform(platform).page_size(size).build().expect("the machine has all it takes")
}
