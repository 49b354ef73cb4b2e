//! x
use catalyst_tests::Checks;
pub fn daemons(_: &mut Checks) {}
