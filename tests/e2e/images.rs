//! x
use catalyst_tests::Checks;
pub fn images(_: &mut Checks) {}
