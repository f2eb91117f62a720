package rollout

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/cespare/xxhash/v2"
	"pgregory.net/rapid"
)

// goldenBuckets is testdata/buckets.json.
type goldenBuckets struct {
	Version    int
	Formula    []string
	Thresholds []struct{ Percent, Threshold string }
	Buckets    []struct {
		Salt, Bucket string
		Key, KeyHex  *string
	}
}

func TestBucketsAreGolden(t *testing.T) {
	text, err := os.ReadFile("testdata/buckets.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden goldenBuckets
	d := json.NewDecoder(bytes.NewReader(text))
	if err := d.Decode(&golden); err != nil {
		t.Fatal(err)
	}
	keys, salts := map[string]bool{}, map[string]bool{}
	for _, v := range golden.Buckets {
		var key string
		switch {
		case v.Key != nil && v.KeyHex == nil:
			key = *v.Key
		case v.Key == nil && v.KeyHex != nil:
			b, err := hex.DecodeString(*v.KeyHex)
			if err != nil {
				t.Fatal(err)
			}
			key = string(b)
		default:
			t.Fatalf("%+v has not one key", v)
		}
		keys[key], salts[v.Salt] = true, true
		want, err := strconv.ParseUint(v.Bucket, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if got := Bucket(v.Salt, key); got != want {
			t.Errorf("Bucket(%q, %q) = %d, not %d", v.Salt, key, got, want)
		}
	}
	for _, v := range golden.Thresholds {
		p, err := strconv.ParseFloat(v.Percent, 64)
		if err != nil {
			t.Fatal(err)
		}
		want, err := strconv.ParseUint(v.Threshold, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if got := Percent(p).threshold(); got != want {
			t.Errorf("the threshold of %v %% is %d, not %d", p, got, want)
		}
	}
	if golden.Version != 1 || len(golden.Formula) == 0 || len(keys) < 40 || len(salts) < 4 || len(golden.Thresholds) < 20 {
		t.Errorf("version %d, %d lines of formula, %d keys, %d salts, %d thresholds: the file is cut", golden.Version, len(golden.Formula), len(keys), len(salts), len(golden.Thresholds))
	}
}

// unmix is the inverse of the last part of the bucket: the XOR of the two hashes that leads to bucket b.
func unmix(b uint64) uint64 {
	b ^= b>>31 ^ b>>62
	b *= 0x319642b2d24d8ec3 // the inverse of 0x94d049bb133111eb modulo 2^64
	b ^= b>>27 ^ b>>54
	b *= 0x96de1b173f119089 // of 0xbf58476d1ce4e5b9
	b ^= b>>30 ^ b>>60
	return b
}

// Two different units of one salt never share a bucket unless their hashes are the same, and neither do two salts.
func TestBucketIsABijectionOfTheHash(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b, salt := rapid.Uint64().Draw(t, "bucket"), rapid.Uint64().Draw(t, "salt")
		if got := bucketOf(salt, unmix(b)^salt); got != b {
			t.Fatalf("bucket %d became %d", b, got)
		}
		if bucketOf(salt, b) != bucketOf(b, salt) {
			t.Fatal("the two hashes are not combined by XOR")
		}
	})
}

// The key is hashed as bytes: what is no UTF-8 is neither replaced nor cut.
func TestBucketTakesBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(t, "key")
		salt := rapid.SliceOfN(rapid.Byte(), 0, 80).Draw(t, "salt")
		got := Bucket(string(salt), string(key))
		if want := bucketOf(xxhash.Sum64(salt), xxhash.Sum64(key)); got != want {
			t.Fatalf("Bucket = %d, not %d", got, want)
		}
		if len(key) == 0 {
			return
		}
		i := rapid.IntRange(0, len(key)-1).Draw(t, "at")
		other := bytes.Clone(key)
		other[i] ^= rapid.ByteRange(1, 255).Draw(t, "flip")
		if Bucket(string(salt), string(other)) == got || Bucket(string(salt), string(key[:i])) == got {
			t.Fatalf("%q, %q and %q are not told apart", key, other, key[:i])
		}
	})
}

// uniform checks the χ² of how many of n units fell into each cell: within 4 standard deviations of its degrees of
// freedom, above and below. Too even is as wrong as uneven.
func uniform(t *testing.T, what string, n int, cells []int) {
	t.Helper()
	want := float64(n) / float64(len(cells))
	chi := 0.
	for _, c := range cells {
		chi += (float64(c) - want) * (float64(c) - want) / want
	}
	df := float64(len(cells) - 1)
	if bound := 4 * math.Sqrt(2*df); math.Abs(chi-df) > bound {
		t.Errorf("%s: χ² is %.1f with %v degrees of freedom, more than %.1f off", what, chi, df, bound)
	}
}

func TestBucketsAreUniform(t *testing.T) {
	const n = 200_000
	sequence := func(format string) []string {
		ids := make([]string, n)
		for i := range ids {
			ids[i] = fmt.Sprintf(format, i)
		}
		return ids
	}
	uuids := make([]string, n)
	for i := range uuids { // a fixed stream of 128 bits a unit
		a, b := Bucket("uuid", strconv.Itoa(2*i)), Bucket("uuid", strconv.Itoa(2*i+1))
		uuids[i] = fmt.Sprintf("%08x-%04x-4%03x-%04x-%012x", a>>32, a>>16&0xffff, a&0xfff, 0x8000|b>>48&0x3fff, b&0xffffffffffff)
	}
	for _, population := range []struct {
		name string
		ids  []string
	}{
		{"numbers", sequence("%d")},
		{"padded numbers", sequence("user-%012d")},
		{"numbers of one end", sequence("%d@a-rather-long-tenant.example.com")},
		{"random UUIDs", uuids},
		{"counted UUIDs", sequence("018f3c5e-0000-7000-8000-%012x")},
		{"real", realIDs(t)},
	} {
		t.Run(population.name, func(t *testing.T) {
			if len(population.ids) == 0 {
				t.Skip("there is no file of them")
			}
			for _, salt := range []string{"", "checkout-v2", "checkout-v3"} {
				var high [256]int // what exposure looks at
				var low [64]int   // what groups of units are made of
				for _, id := range population.ids {
					b := Bucket(salt, id)
					high[b>>56]++
					low[b&63]++
				}
				uniform(t, fmt.Sprintf("salt %q, high bits", salt), len(population.ids), high[:])
				uniform(t, fmt.Sprintf("salt %q, low bits", salt), len(population.ids), low[:])
			}
		})
	}
}

// realIDs reads identifiers that somebody uses, one a line, from the gzip file that ROLLOUT_REAL_IDS names; none, if
// there is no such file.
func realIDs(t *testing.T) []string {
	name := os.Getenv("ROLLOUT_REAL_IDS")
	if name == "" {
		name = "../shared/data/real_ids_npm_package_names.txt.gz"
	}
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) && os.Getenv("ROLLOUT_REAL_IDS") == "" {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	seen := map[string]bool{}
	lines := bufio.NewScanner(z)
	for lines.Scan() {
		if id := strings.TrimSpace(lines.Text()); id != "" && !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return ids
}

// within4 checks that x of n units is within 4 standard deviations of the share p.
func within4(t *testing.T, what string, x, n int, p float64) {
	t.Helper()
	mean, sd := float64(n)*p, math.Sqrt(float64(n)*p*(1-p))
	if math.Abs(float64(x)-mean) > 4*sd {
		t.Errorf("%s: %d of %d units, not %.0f ± %.0f", what, x, n, mean, 4*sd)
	}
}

// Two salts share p·q of the units, not more, not less: here 10 % of 10 % for all 45 pairs of 10 salts that differ in
// little.
func TestSaltsAreIndependent(t *testing.T) {
	const n = 100_000
	limit := Percent(10).threshold()
	in := make([]uint16, n) // a bit a salt
	for s := range 10 {
		salt := fmt.Sprintf("checkout-v%d", s)
		for i := range in {
			if Bucket(salt, strconv.Itoa(i)) < limit {
				in[i] |= 1 << s
			}
		}
	}
	for a := range 10 {
		alone := 0
		for _, bits := range in {
			alone += int(bits >> a & 1)
		}
		within4(t, fmt.Sprintf("salt %d", a), alone, n, 0.1)
		for b := range a {
			both := 0
			for _, bits := range in {
				both += int(bits >> a & (bits >> b) & 1)
			}
			within4(t, fmt.Sprintf("salts %d and %d", b, a), both, n, 0.01)
		}
	}
}

// Shares are of any fineness: 0.001 % of ten million is a hundred.
func TestTinyShares(t *testing.T) {
	const n = 10_000_000
	limit := Percent(0.001).threshold()
	salt, x := xxhash.Sum64String("checkout-v2"), 0
	var key []byte
	for i := range n {
		key = strconv.AppendInt(key[:0], int64(i), 10)
		if bucketOf(salt, xxhash.Sum64(key)) < limit {
			x++
		}
	}
	within4(t, "0.001 %", x, n, 0.00001)
}
