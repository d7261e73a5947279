//! Ctrl-C, and SIGTERM: the first asks for an end with what there is, the second is one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};

/// What is set by the first, once it is heard.
static ASKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From here on the first ends nothing by itself.
///
/// # Errors
/// Where the handlers can't be set up.
pub(crate) fn hear() -> std::io::Result<()> {
    let asked = ASKED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(asked))?;
        signal_hook::flag::register(signal, Arc::clone(asked))?;
    }
    Ok(())
}

/// Whether it came.
pub(crate) fn asked() -> bool {
    ASKED.get().is_some_and(|asked| asked.load(Ordering::Relaxed))
}
