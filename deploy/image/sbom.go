package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"runtime/debug"
	"strings"
	"time"
)

const license = "Apache-2.0"

// An SPDX document, version 2.3, with what we say in it.
type spdxDocument struct {
	SPDXVersion       string         `json:"spdxVersion"`
	DataLicense       string         `json:"dataLicense"`
	SPDXID            string         `json:"SPDXID"`
	Name              string         `json:"name"`
	DocumentNamespace string         `json:"documentNamespace"`
	CreationInfo      spdxCreation   `json:"creationInfo"`
	Packages          []spdxPackage  `json:"packages"`
	Relationships     []spdxRelation `json:"relationships"`
}

type spdxCreation struct {
	Created  string   `json:"created"`
	Creators []string `json:"creators"`
}

type spdxPackage struct {
	SPDXID           string         `json:"SPDXID"`
	Name             string         `json:"name"`
	VersionInfo      string         `json:"versionInfo,omitempty"`
	DownloadLocation string         `json:"downloadLocation"`
	FilesAnalyzed    bool           `json:"filesAnalyzed"`
	LicenseConcluded string         `json:"licenseConcluded"`
	LicenseDeclared  string         `json:"licenseDeclared"`
	CopyrightText    string         `json:"copyrightText"`
	Purpose          string         `json:"primaryPackagePurpose,omitempty"`
	FileName         string         `json:"packageFileName,omitempty"`
	Checksums        []spdxChecksum `json:"checksums,omitempty"`
	SourceInfo       string         `json:"sourceInfo,omitempty"`
	ExternalRefs     []spdxRef      `json:"externalRefs,omitempty"`
}

type spdxChecksum struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"checksumValue"`
}

type spdxRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type spdxRelation struct {
	Element string `json:"spdxElementId"`
	Type    string `json:"relationshipType"`
	Related string `json:"relatedSpdxElement"`
}

const none = "NOASSERTION"

// sbom says what is linked into the programs of an image: each module with its version and the hash that go.sum has of it, as
// the Go toolchain wrote it into the program, and the standard library. Licences it does not judge.
func (b *build) sbom(r recipe, programs []*program) ([]byte, error) {
	arch := programs[0].arch
	sums := ""
	for _, p := range programs {
		sums += "/" + digest(p.data)
	}
	doc := spdxDocument{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: "SPDXRef-DOCUMENT", Name: r.name + "_linux_" + arch,
		DocumentNamespace: "https://signet-id.github.io/spdx/" + r.name + "/" + arch + sums,
		CreationInfo:      spdxCreation{Created: b.time.Format(time.RFC3339), Creators: []string{"Tool: signet-deploy-image"}},
	}
	libraries := map[string]string{} // SPDX ids by purl
	for i, p := range programs {
		id := fmt.Sprintf("SPDXRef-program-%d", i+1)
		doc.Packages = append(doc.Packages, spdxPackage{
			SPDXID: id, Name: p.name + "_linux_" + arch, VersionInfo: b.version, DownloadLocation: none, LicenseConcluded: none, LicenseDeclared: license, CopyrightText: none,
			Purpose: "APPLICATION", FileName: "usr/bin/" + p.name, Checksums: []spdxChecksum{{"SHA256", digest(p.data)}},
			SourceInfo:   "commit " + b.commit,
			ExternalRefs: []spdxRef{purl(p.info.Path, b.version)},
		})
		doc.Relationships = append(doc.Relationships, spdxRelation{doc.SPDXID, "DESCRIBES", id})
		add := func(name, version, source string) {
			ref := purl(name, version)
			lib, ok := libraries[ref.Locator]
			if !ok {
				lib = fmt.Sprintf("SPDXRef-module-%d", len(libraries)+1)
				libraries[ref.Locator] = lib
				doc.Packages = append(doc.Packages, library(lib, name, version, source, ref))
			}
			doc.Relationships = append(doc.Relationships, spdxRelation{id, "STATIC_LINK", lib})
		}
		add("std", strings.TrimPrefix(p.info.GoVersion, "go"), "the Go toolchain's standard library")
		for _, m := range p.info.Deps {
			m, err := linked(m)
			if err != nil {
				return nil, err
			}
			add(m.Path, m.Version, "go.sum has "+m.Sum)
		}
	}
	return json.MarshalIndent(doc, "", " ")
}

func library(id, name, version, source string, ref spdxRef) spdxPackage {
	return spdxPackage{SPDXID: id, Name: name, VersionInfo: version, DownloadLocation: none, LicenseConcluded: none, LicenseDeclared: none, CopyrightText: none,
		Purpose: "LIBRARY", SourceInfo: source, ExternalRefs: []spdxRef{ref}}
}

// linked is the module that was linked where m was asked for.
func linked(m *debug.Module) (*debug.Module, error) {
	if m.Replace != nil {
		m = m.Replace
	}
	if m.Version == "" || m.Sum == "" {
		return nil, errors.New("module " + m.Path + " comes from a folder, so that nobody can tell which it is; build without replace directives and workspaces")
	}
	return m, nil
}

// purl is the package URL of a Go module.
func purl(path, version string) spdxRef {
	parts := strings.Split(path, "/")
	for i, p := range parts {
		parts[i] = url.PathEscape(p)
	}
	return spdxRef{"PACKAGE-MANAGER", "purl", "pkg:golang/" + strings.Join(parts, "/") + "@" + url.PathEscape(version)}
}
