//! x
use catalyst_tests::Checks;
pub fn legacy(_: &mut Checks) {}
