package rollout

import "github.com/cespare/xxhash/v2"

// Unit is who is assigned: a user, tenant, session, host or job. The zero value is a unit nobody knows.
type Unit struct {
	// Key identifies the unit; its bytes are hashed as they are, UTF-8, NUL and all. With an empty Key no percentage can
	// apply: such a unit gets the candidate only where its ring is at 100 % without a Holdback.
	Key string
	// Groups are memberships that the host computed, such as "staff" or "region:eu". A [Ring] without Match takes the
	// units whose Groups contain its name.
	Groups []string
}

// Bucket returns a unit's fixed point in [0, 2^64) for one salt:
//
//	bucket(salt, key) = mix(XXH64(key, seed 0) XOR XXH64(salt, seed 0))
//
// where mix is the finisher of SplitMix64, a bijection. A unit is in a share of p percent if its bucket is below
// p/100 · 2^64, so raising a share never takes a unit out and different salts choose independently.
//
// This is bucketing version 1. It is the same on every platform and in every release: testdata/buckets.json holds
// vectors for other languages.
func Bucket(salt, key string) uint64 {
	return bucketOf(xxhash.Sum64String(salt), xxhash.Sum64String(key))
}

// bucketOf is [Bucket] from the two hashes, so that a request which asks several rollouts hashes its key once.
func bucketOf(salt, key uint64) uint64 {
	z := key ^ salt
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
