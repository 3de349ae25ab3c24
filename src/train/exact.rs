//! f64 in JSON without losing a bit: as a number where the JSON parser gives back the very same one, else as text.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Number {
    Number(f64),
    Text(String),
}

pub(super) fn serialize<S: Serializer>(x: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    let parsed = serde_json::to_string(x).ok().and_then(|text| serde_json::from_str::<f64>(&text).ok());
    let number = match parsed {
        Some(parsed) if parsed.to_bits() == x.to_bits() => Number::Number(*x),
        _ => Number::Text(x.to_string()),
    };
    number.serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    match Number::deserialize(deserializer)? {
        Number::Number(x) => Ok(x),
        Number::Text(text) => text.parse().map_err(D::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct One(#[serde(with = "super")] f64);

    #[test]
    fn every_number_comes_back() {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let odd = [0.1, 3e-4, 1.0 / 3.0, 0.0, -0.0, f64::INFINITY, f64::MIN_POSITIVE / 8.0, f64::MAX];
        let random = std::iter::repeat_with(|| {
            x = x.wrapping_mul(0xd129_0d3b_3f5f_2d4b).wrapping_add(1);
            f64::from_bits(x)
        });
        for x in odd.into_iter().chain(random.filter(|x| !x.is_nan()).take(20_000)) {
            let text = serde_json::to_string(&One(x)).unwrap();
            assert_eq!(serde_json::from_str::<One>(&text).unwrap().0.to_bits(), x.to_bits(), "{text}");
        }
        assert_eq!(serde_json::to_string(&One(3e-4)).unwrap(), "0.0003");
    }
}
