package rollout

import (
	"bytes"
	"strings"
	"testing"
)

// No bytes make the parser panic, and it accepts none but those that are
// written for what it returns.
func FuzzDirStoreFile(f *testing.F) {
	good := formatDirFile(dirEntry{"checkout/head", 1 << 62, []byte(`{"share":5}`)})
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add(append(bytes.Clone(good), 0))
	f.Add(bytes.Replace(good, []byte(" 1 "), []byte(" 2 "), 1))
	f.Add(bytes.Replace(good, []byte(" 11 "), []byte(" 011 "), 1))
	f.Add(bytes.Replace(good, []byte(" 11 "), []byte(" 99999999999999999999 "), 1))
	f.Add(bytes.Replace(good, []byte(" 13 "), []byte(" -13 "), 1))
	f.Add(formatDirFile(dirEntry{"k", 1, nil}))
	f.Add([]byte(dirMagic))
	f.Add([]byte(dirMagic + " "))
	f.Add([]byte(dirMagic + " 1 1 1 1 1"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parseDirFile(b)
		if err != nil {
			if e.key != "" || e.revision != 0 || e.value != nil {
				t.Errorf("an entry %v besides the error %v", e, err)
			}
			return
		}
		if e.value == nil || e.revision == 0 || e.revision>>63 != 0 || checkStoreKey(e.key) != nil {
			t.Errorf("entry %v", e)
		}
		if again := formatDirFile(e); !bytes.Equal(again, b) {
			t.Errorf("%q\nwritten again:\n%q", b, again)
		}
	})
}

// What was written is read, and one flipped bit is not.
func FuzzDirStoreFileRoundTrip(f *testing.F) {
	f.Add("checkout/head", uint64(1), []byte(`{"share":5}`), uint(3))
	f.Add("a\nb", uint64(1<<63-1), []byte{}, uint(100))
	f.Fuzz(func(t *testing.T, key string, revision uint64, value []byte, bit uint) {
		revision &= 1<<63 - 1
		if checkStoreKey(key) != nil || revision == 0 {
			return
		}
		b := formatDirFile(dirEntry{key, revision, value})
		e, err := parseDirFile(b)
		if err != nil || e.key != key || e.revision != revision || !bytes.Equal(e.value, value) {
			t.Errorf("%v, %v", e, err)
		}
		bit %= uint(8 * len(b))
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := parseDirFile(b); err == nil {
			t.Errorf("accepted with bit %d flipped: %q", bit, b)
		}
	})
}

// Names are safe in every file system, differ for different keys, and give the
// key back if they are short.
func FuzzDirStoreName(f *testing.F) {
	long := strings.Repeat("k", 300)
	for _, k := range []string{"checkout/head", "A", "a", "%41", ".lock", "..", "~", "ä", "\xff\xfe", long, long + "k", strings.Repeat("K", 64)} {
		f.Add(k, "a")
		f.Add(k, long)
		f.Add(k, k+"x")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		if key, ok := dirUnescape(dirEscape(a)); !ok || key != a {
			t.Errorf("%q: escaped and back %q, %v", a, key, ok)
		}
		if key, ok := dirUnescape(a); ok && dirEscape(key) != a { // a as somebody's file name
			t.Errorf("%q: taken for the escape of %q", a, key)
		}
		if checkStoreKey(a) != nil {
			return
		}
		name := dirKeyName(a)
		if len(name) > maxDirName || strings.HasPrefix(name, ".") {
			t.Errorf("%q: name %q", a, name)
		}
		for _, c := range []byte(name) {
			if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789-_%~.", rune(c)) {
				t.Errorf("%q: name %q", a, name)
			}
		}
		if (a == b) != (name == dirKeyName(b)) {
			t.Errorf("%q and %q: names %q and %q", a, b, name, dirKeyName(b))
		}
		for i := range len(a) + 1 {
			if !dirNameMayBegin(name, a[:i]) {
				t.Errorf("%q: name %q not found by prefix %q", a, name, a[:i])
			}
		}
		if !strings.Contains(name, "~") && dirNameMayBegin(name, b) != strings.HasPrefix(a, b) {
			t.Errorf("%q: name %q, prefix %q: wrong", a, name, b)
		}
	})
}
