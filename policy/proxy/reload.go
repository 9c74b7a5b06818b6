package proxy

import (
	"fmt"
	"net"
	"reflect"
	"slices"
	"strings"

	"github.com/signet-id/signet/internal/sandbox"
)

// Reload takes over what can change while it runs. Connections go on with what they began with. It returns the fields that
// need a restart: what is listened on, and what the sandbox closed at the start.
func (p *Proxy) Reload(c Config) (needRestart []string, err error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	p.reloading.Lock()
	defer p.reloading.Unlock()
	if level, err := c.Logging.level(); err == nil {
		p.level.Set(level)
	}
	p.running.Logging.Level = c.Logging.Level
	have, want := p.running, c
	have.Inbound, have.Outbound, want.Inbound, want.Outbound = nil, nil, nil, nil
	needRestart = differences(have, want)
	need := func(format string, args ...any) { needRestart = append(needRestart, fmt.Sprintf(format, args...)) }

	kept := map[string]bool{}
	for _, now := range c.Inbound {
		at := slices.IndexFunc(p.inbound, func(in *inbound) bool { return in.name == now.Name })
		if at < 0 {
			need("inbound.%s", now.Name)
			continue
		}
		kept[now.Name] = true
		in := p.inbound[at]
		if !p.mayConnect(now.Backend) {
			need("inbound.%s.backend", now.Name)
			now.Backend = in.config.Load().Backend
		}
		for _, field := range in.reload(now) {
			need("inbound.%s.%s", now.Name, field)
		}
	}
	for _, now := range c.Outbound {
		at := slices.IndexFunc(p.outbound, func(out *outbound) bool { return out.name == now.Name })
		if at < 0 {
			need("outbound.%s", now.Name)
			continue
		}
		kept[now.Name] = true
		out := p.outbound[at]
		if !p.mayConnect(now.Address) {
			need("outbound.%s.address", now.Name)
			now.Address = out.config.Load().Address
		}
		for _, field := range out.reload(now) {
			need("outbound.%s.%s", now.Name, field)
		}
	}
	for _, in := range p.inbound {
		if !kept[in.name] {
			need("inbound.%s", in.name)
		}
	}
	for _, out := range p.outbound {
		if !kept[out.name] {
			need("outbound.%s", out.name)
		}
	}
	return needRestart, nil
}

// mayConnect says whether the sandbox, which was made for the first configuration, lets the proxy connect to an address.
func (p *Proxy) mayConnect(address string) bool {
	network, addr := split(address)
	if network == "unix" || p.config.Sandbox.Landlock == sandbox.Off {
		return true // Landlock does not see who connects to Unix sockets
	}
	return slices.Contains(p.config.ports(), portOf(addr))
}

func portOf(address string) uint16 {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return 0
	}
	n, err := net.LookupPort("tcp", port)
	if err != nil {
		return 0
	}
	return uint16(n)
}

// reload takes over what can change while it runs, and names what cannot.
func (in *inbound) reload(c Inbound) (needRestart []string) {
	have := *in.config.Load()
	now := c
	now.Listen, now.Service, now.Protocol = have.Listen, have.Service, have.Protocol
	now.HTTP.MaxHeaderBytes, now.Limits.HeaderTimeout = have.HTTP.MaxHeaderBytes, have.Limits.HeaderTimeout
	if c.Protocol != have.Protocol {
		now = have // nothing of it fits
	}
	in.config.Store(&now)
	if in.front != nil && now != have {
		in.backend.Swap(newBackend(now)).retire()
	}
	return differences(now, c)
}

// reload takes over what can change while it runs, and names what cannot.
func (out *outbound) reload(c Outbound) (needRestart []string) {
	have := out.config.Load().Outbound
	now := c
	now.Listen, now.SocketGroup, now.AllowOtherHosts, now.Protocol = have.Listen, have.SocketGroup, have.AllowOtherHosts, have.Protocol
	now.Limits.HeaderTimeout = have.Limits.HeaderTimeout
	if c.Protocol != have.Protocol {
		now = have // nothing of it fits
	}
	if len(differences(have, now)) > 0 {
		if old := out.config.Swap(out.ready(now)); old.backend != nil {
			old.backend.retire()
		}
	}
	return differences(now, c)
}

// differences are the keys of the fields in which two structs differ.
func differences(have, want any) (keys []string) {
	h, w := reflect.ValueOf(have), reflect.ValueOf(want)
	for i := range h.NumField() {
		key, _, _ := strings.Cut(h.Type().Field(i).Tag.Get("yaml"), ",")
		if key == "-" || reflect.DeepEqual(h.Field(i).Interface(), w.Field(i).Interface()) {
			continue
		}
		if h.Field(i).Kind() != reflect.Struct {
			keys = append(keys, key)
			continue
		}
		for _, inner := range differences(h.Field(i).Interface(), w.Field(i).Interface()) {
			keys = append(keys, key+"."+inner)
		}
	}
	return keys
}
