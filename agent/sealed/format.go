package sealed

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// Version is the newest format that is read, and the one that is written.
//
// The cache is a head and a log. The log begins with its salt, from which and the secret its key is derived; then come
// frames, each sealed under that key with its number as nonce. The head, under a key of a salt of its own, says which log
// belongs to it and how much of it counts. A log is appended to by the process that began it, and never after a write
// that failed: no two frames ever have the same key and nonce. Each head is a new file under a new key.
const Version = 1

const (
	headMagic = "signet\x1ahead\n"
	logMagic  = "signet\x1aclog\n"
	saltBytes = 32
	idBytes   = 8

	maxHeadBytes = 16 << 10
	// maxLogBytes bounds what a log may have.
	maxLogBytes = 512 << 20
	// frameBytes is the size from which on a frame is full; maxFrameBytes bounds what one may be when it is read.
	frameBytes    = 256 << 10
	maxFrameBytes = 40 << 20
	// maxValueBytes bounds one record.
	maxValueBytes = 32 << 20
	maxKeyBytes   = 64 << 10

	logHeaderBytes = len(logMagic) + 2 + saltBytes
)

// The uses of keys, as they stand in the derivation and in the associated data.
const (
	useHead  = "signet agent cache v1 head"
	useLog   = "signet agent cache v1 log"
	useKeyID = "signet agent cache v1 key id"
	useNode  = "signet agent node key v1"
)

// errNewer says that a newer program wrote the file. Nothing of it beyond its version was looked at.
var errNewer = errors.New("it has a newer format")

// An owner is whom a cache belongs to. All of it is associated data of whatever is sealed.
type owner struct {
	kind        string // of key
	trustDomain string
	agent       string // SPIFFE ID
}

// newAEAD derives the key for one use and salt.
func newAEAD(s *secret, salt []byte, use string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, s.b[:], salt, use, 32)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// A head is what the file head says.
type head struct {
	generation uint64
	logSalt    [saltBytes]byte
	logLength  uint64 // what counts of the log, in bytes
	frames     uint32 // and in frames
	counter    uint64 // of the key, if it has one
	contact    time.Time
	seen       time.Time
	schema     [sha256.Size]byte
}

const headPlainBytes = 8 + saltBytes + 8 + 4 + 8 + 8 + 8 + sha256.Size

// sealHead returns the file.
func sealHead(s *secret, o owner, h *head) ([]byte, error) {
	out := binary.BigEndian.AppendUint16([]byte(headMagic), Version)
	for _, text := range []string{o.kind, o.trustDomain, o.agent} {
		out = binary.BigEndian.AppendUint16(out, uint16(len(text)))
		out = append(out, text...)
	}
	id, err := s.id()
	if err != nil {
		return nil, err
	}
	out = append(out, id...)
	var salt [saltBytes]byte
	rand.Read(salt[:])
	out = append(out, salt[:]...)
	plain := binary.BigEndian.AppendUint64(nil, h.generation)
	plain = append(plain, h.logSalt[:]...)
	plain = binary.BigEndian.AppendUint64(plain, h.logLength)
	plain = binary.BigEndian.AppendUint32(plain, h.frames)
	plain = binary.BigEndian.AppendUint64(plain, h.counter)
	plain = binary.BigEndian.AppendUint64(plain, uint64(nanos(h.contact)))
	plain = binary.BigEndian.AppendUint64(plain, uint64(nanos(h.seen)))
	plain = append(plain, h.schema[:]...)
	aead, err := newAEAD(s, salt[:], useHead)
	if err != nil {
		return nil, err
	}
	return aead.Seal(out, make([]byte, aead.NonceSize()), plain, additional(useHead, out)), nil
}

// openHead reads what sealHead wrote.
func openHead(s *secret, o owner, data []byte) (*head, error) {
	in := reader{data: data}
	if err := in.preamble(headMagic); err != nil {
		return nil, err
	}
	kind, td, agent := in.text(), in.text(), in.text()
	id, salt := in.take(idBytes), in.take(saltBytes)
	if in.failed {
		return nil, errors.New("the head is too short")
	}
	mine, err := s.id()
	if err != nil {
		return nil, err
	}
	switch {
	case td != o.trustDomain:
		return nil, fmt.Errorf("it is of trust domain %q, and this agent's is %q", td, o.trustDomain)
	case agent != o.agent:
		return nil, fmt.Errorf("it is of the agent %q, and this one is %q", agent, o.agent)
	case kind != o.kind:
		return nil, fmt.Errorf("it was sealed with a key of kind %q, and sealed_cache.key is %q", kind, o.kind)
	case !bytes.Equal(id, mine):
		return nil, errors.New("it was sealed with another key")
	}
	aead, err := newAEAD(s, salt, useHead)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, make([]byte, aead.NonceSize()), in.data[in.at:], additional(useHead, data[:in.at]))
	if err != nil || len(plain) != headPlainBytes {
		return nil, errors.New("the head is not what was written")
	}
	p := reader{data: plain}
	h := &head{generation: p.u64(), logSalt: [saltBytes]byte(p.take(saltBytes)), logLength: p.u64(), frames: p.u32(), counter: p.u64()}
	h.contact, h.seen = moment(int64(p.u64())), moment(int64(p.u64()))
	h.schema = [sha256.Size]byte(p.take(sha256.Size))
	return h, nil
}

// additional is the associated data of one use.
func additional(use string, more []byte) []byte {
	out := append([]byte(use), 0)
	return append(out, more...)
}

// nanos and moment keep the zero time.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func moment(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// A logSealer seals the frames of one log, in their order.
type logSealer struct {
	aead   cipher.AEAD
	ad     []byte // without the number
	salt   [saltBytes]byte
	frames uint32
}

// newLogSealer begins a log; header is its first bytes.
func newLogSealer(s *secret, o owner, generation uint64) (l *logSealer, header []byte, err error) {
	l = &logSealer{}
	rand.Read(l.salt[:])
	if err := l.init(s, o, generation); err != nil {
		return nil, nil, err
	}
	header = binary.BigEndian.AppendUint16([]byte(logMagic), Version)
	return l, append(header, l.salt[:]...), nil
}

func (l *logSealer) init(s *secret, o owner, generation uint64) (err error) {
	l.ad = additional(useLog, nil)
	for _, text := range []string{o.kind, o.trustDomain, o.agent} {
		l.ad = binary.BigEndian.AppendUint16(l.ad, uint16(len(text)))
		l.ad = append(l.ad, text...)
	}
	l.ad = binary.BigEndian.AppendUint64(l.ad, generation)
	l.aead, err = newAEAD(s, l.salt[:], useLog)
	return err
}

func (l *logSealer) nonce() []byte {
	nonce := make([]byte, l.aead.NonceSize())
	binary.BigEndian.PutUint32(nonce[len(nonce)-4:], l.frames)
	return nonce
}

func (l *logSealer) additional() []byte {
	return binary.BigEndian.AppendUint32(append([]byte(nil), l.ad...), l.frames)
}

// errFull says that a log can take no more; another is begun.
var errFull = errors.New("the log has as much as one may have")

// seal appends a frame to out.
func (l *logSealer) seal(out, plain []byte) ([]byte, error) {
	if l.frames == 1<<32-1 {
		return nil, errFull
	}
	out = binary.BigEndian.AppendUint32(out, uint32(len(plain)+l.aead.Overhead()))
	out = l.aead.Seal(out, l.nonce(), plain, l.additional())
	l.frames++
	return out, nil
}

// readLog calls f with the plain text of each frame that counts. What stands behind them is of a write that was not
// finished.
func readLog(s *secret, o owner, h *head, data []byte, f func(plain []byte) error) error {
	if uint64(len(data)) < h.logLength {
		return fmt.Errorf("the log has %d bytes, and %d were written", len(data), h.logLength)
	}
	in := reader{data: data[:h.logLength]}
	if err := in.preamble(logMagic); err != nil {
		return err
	}
	l := &logSealer{}
	salt := in.take(saltBytes)
	if in.failed || !bytes.Equal(salt, h.logSalt[:]) {
		return errors.New("the log is not the one of the head")
	}
	l.salt = h.logSalt
	if err := l.init(s, o, h.generation); err != nil {
		return err
	}
	for in.at < len(in.data) {
		n := in.u32()
		if n > maxFrameBytes {
			return fmt.Errorf("frame %d announces %d bytes, more than the %d allowed", l.frames, n, maxFrameBytes)
		}
		sealed := in.take(int(n))
		if in.failed {
			return fmt.Errorf("frame %d is cut off", l.frames)
		}
		plain, err := l.aead.Open(nil, l.nonce(), sealed, l.additional())
		if err != nil {
			return fmt.Errorf("frame %d is not what was written", l.frames)
		}
		l.frames++
		err = f(plain)
		clear(plain)
		if err != nil {
			return fmt.Errorf("frame %d: %w", l.frames-1, err)
		}
	}
	if l.frames != h.frames {
		return fmt.Errorf("the log has %d frames, and %d were written", l.frames, h.frames)
	}
	return nil
}

// A reader takes apart what is of bounded size. After a failure it returns zero values.
type reader struct {
	data   []byte
	at     int
	failed bool
}

func (r *reader) take(n int) []byte {
	if r.failed || n < 0 || n > len(r.data)-r.at {
		r.failed = true
		return nil
	}
	r.at += n
	return r.data[r.at-n : r.at]
}

func (r *reader) text() string { return string(r.take(int(r.u16()))) }

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) uvarint() int {
	if r.failed {
		return 0
	}
	v, n := binary.Uvarint(r.data[r.at:])
	if n <= 0 || v > maxLogBytes || n > 1 && v>>(7*(n-1)) == 0 { // longer than need be: there is one way to write each
		r.failed = true
		return 0
	}
	r.at += n
	return int(v)
}

// preamble reads magic and version.
func (r *reader) preamble(magic string) error {
	if got := r.take(len(magic)); string(got) != magic {
		return errors.New("it is not a file of the sealed cache")
	}
	switch version := r.u16(); {
	case r.failed:
		return errors.New("it is not a file of the sealed cache")
	case version > Version:
		return fmt.Errorf("%w: %d, this agent reads up to %d", errNewer, version, Version)
	case version != Version:
		return fmt.Errorf("there is no format %d", version)
	}
	return nil
}
