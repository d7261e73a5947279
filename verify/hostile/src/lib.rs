//! What comes from outside, made of any bytes, next to naive oracles: it panics when one is not
//! kept to. `fuzz/` has libFuzzer choose the bytes, the tests here have proptest.
//!
//! | outside | what must hold |
//! |---|---|
//! | [`scenario()`] | a text is read or refused; what was read is written so that it is read again |
//! | [`guest()`] | a guest's requests do what they say, or nothing; pages and bytes are as the oracle says |

mod bytes;
mod guest;
mod oracle;
mod scenario;

pub use guest::guest;
pub use scenario::scenario;
