//! x
use catalyst_tests::Checks;
pub fn access(_: &mut Checks) {}
