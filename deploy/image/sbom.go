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

// sbom says what is linked into a program: each module with its version and the hash that go.sum has of it, as the Go
// toolchain wrote it into the program, and the standard library. Licences it does not judge.
func (b *build) sbom(r recipe, p *program) ([]byte, error) {
	sum := digest(p.data)
	name := r.program + "_linux_" + p.arch
	program := spdxPackage{
		SPDXID: "SPDXRef-program", Name: name, VersionInfo: b.version, DownloadLocation: none, LicenseConcluded: none, LicenseDeclared: license, CopyrightText: none,
		Purpose: "APPLICATION", FileName: "usr/bin/" + r.program, Checksums: []spdxChecksum{{"SHA256", sum}},
		SourceInfo:   "commit " + b.commit,
		ExternalRefs: []spdxRef{purl(p.info.Main.Path, b.version)},
	}
	doc := spdxDocument{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: "SPDXRef-DOCUMENT", Name: r.name + "_linux_" + p.arch,
		DocumentNamespace: "https://signet-id.github.io/spdx/" + r.name + "/" + p.arch + "/" + sum,
		CreationInfo:      spdxCreation{Created: b.time.Format(time.RFC3339), Creators: []string{"Tool: signet-deploy-image"}},
		Packages:          []spdxPackage{program},
		Relationships:     []spdxRelation{{"SPDXRef-DOCUMENT", "DESCRIBES", program.SPDXID}},
	}
	add := func(p spdxPackage) {
		doc.Packages = append(doc.Packages, p)
		doc.Relationships = append(doc.Relationships, spdxRelation{program.SPDXID, "STATIC_LINK", p.SPDXID})
	}
	add(library("SPDXRef-go", "std", strings.TrimPrefix(p.info.GoVersion, "go"), "", purl("std", strings.TrimPrefix(p.info.GoVersion, "go"))))
	for i, m := range p.info.Deps {
		m, err := linked(m)
		if err != nil {
			return nil, err
		}
		add(library(fmt.Sprintf("SPDXRef-module-%d", i+1), m.Path, m.Version, "go.sum has "+m.Sum, purl(m.Path, m.Version)))
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
