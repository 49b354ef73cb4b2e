//! x
use catalyst_tests::Checks;
pub fn hosts(_: &mut Checks) {}
