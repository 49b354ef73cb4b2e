//! Machine descriptions: what is taken can be written and read again.

#![no_main]
#![allow(clippy::unwrap_used)]

use catalyst_vmm::description::Description;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    if let Ok(description) = Description::from_json(text) {
        let again = serde_json::to_vec(&description).unwrap();
        assert_eq!(Description::from_json(&again).unwrap(), description);
    }
});
