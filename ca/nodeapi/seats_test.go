package nodeapi

import (
	"net/netip"
	"testing"
)

func TestSeats(t *testing.T) {
	var s seats
	var leaves []func()
	take := func(addr string) error {
		leave, err := s.take(netip.MustParseAddr(addr))
		if err == nil {
			leaves = append(leaves, leave)
		}
		return err
	}
	for range maxAttestingFrom {
		if err := take("192.0.2.1"); err != nil {
			t.Fatal(err)
		}
		if err := take("2001:db8::1"); err != nil {
			t.Fatal(err)
		}
	}
	for addr, full := range map[string]bool{"192.0.2.1": true, "192.0.2.2": false, "2001:db8::2": true, "2001:db8:0:1::1": false} {
		if err := take(addr); (err != nil) != full {
			t.Errorf("one more from %s: %v", addr, err)
		}
	}
	for i := 3; s.taken < maxAttesting; i++ {
		if err := take(netip.AddrFrom4([4]byte{192, 0, byte(2 + i/256), byte(i)}).String()); err != nil {
			t.Fatal(err)
		}
	}
	if take("203.0.113.1") == nil {
		t.Error("there are more seats than there are")
	}
	for _, leave := range leaves {
		leave()
	}
	if s.taken != 0 || len(s.from) != 0 {
		t.Errorf("%d seats of %d addresses are taken when all have left", s.taken, len(s.from))
	}
}
