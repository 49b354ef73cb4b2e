//! Whether a machine that was saved can go on: only on the program and the processor that it was saved by.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Two rates of a time-stamp counter that differ by less than this part are one rate, measured twice.
const SAME_RATE: u64 = 1000;

/// What a saved machine depends on, beside the VM's own size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fit {
    /// The program and its version.
    pub program: String,
    /// The generation of the machine's make-up: which devices it has, and where.
    pub machine: u32,
    /// The processor that the guest sees something of; empty where it is all software.
    pub processor: String,
    /// Rate of the time-stamp counter, kHz.
    pub tsc_khz: u64,
}

impl Fit {
    /// Why a machine of `saved` cannot go on here; none if it can.
    pub fn refuses(&self, saved: &Self) -> Option<Misfit> {
        let misfit = |what, saved: &dyn fmt::Display, here: &dyn fmt::Display| {
            Some(Misfit { what, saved: saved.to_string(), here: here.to_string() })
        };
        if self.program != saved.program {
            return misfit("program", &saved.program, &self.program);
        }
        if self.machine != saved.machine {
            return misfit("make-up of the machine", &saved.machine, &self.machine);
        }
        if self.processor != saved.processor {
            return misfit("processor", &saved.processor, &self.processor);
        }
        if self.tsc_khz.abs_diff(saved.tsc_khz) > self.tsc_khz / SAME_RATE {
            return misfit("clock rate in kHz", &saved.tsc_khz, &self.tsc_khz);
        }
        None
    }
}

/// What is another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    what: &'static str,
    saved: String,
    here: String,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its {} was '{}', here it is '{}'", self.what, self.saved, self.here)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_rate_measured_twice_may_differ() {
        let here = Fit { program: "q 7".into(), machine: 1, processor: String::new(), tsc_khz: 2_400_000 };
        assert_eq!(here.refuses(&here.clone()), None);
        assert_eq!(here.refuses(&Fit { tsc_khz: 2_401_000, ..here.clone() }), None);
        for (other, word) in [
            (Fit { tsc_khz: 2_500_000, ..here.clone() }, "2500000"),
            (Fit { program: "q 8".into(), ..here.clone() }, "'q 8'"),
            (Fit { machine: 2, ..here.clone() }, "make-up"),
            (Fit { processor: "other".into(), ..here.clone() }, "processor"),
        ] {
            assert!(here.refuses(&other).unwrap().to_string().contains(word));
        }
    }
}
